"""The container, without a container engine.  crun runs the program as the
Containerfile says, in a bundle that this file makes."""

import json
import os
import re
import shlex
import shutil
import subprocess
import tempfile

import pytest

import harness
import real
from harness import CLAMSMTPD, EICAR, TOP, VIRUS, WAIT, Hold, until

DIRECTORY = os.path.join(TOP, "packaging", "container")


def instructions(name="Containerfile"):
    """The instructions of a Containerfile, as a list of (instruction, rest) for
    each stage."""
    with open(os.path.join(DIRECTORY, name)) as file:
        text = re.sub(r"(?m)^#.*\n", "", file.read()).replace("\\\n", " ")
    stages = []
    for line in filter(None, map(str.strip, text.split("\n"))):
        word, _, rest = line.partition(" ")
        if word == "FROM":
            stages.append([])
        stages[-1].append((word, rest))
    return stages


IMAGE = dict(instructions()[-1])
ENV = dict(pair.split("=", 1) for pair in shlex.split(IMAGE["ENV"]))
COMMAND = json.loads(IMAGE["ENTRYPOINT"]) + json.loads(IMAGE["CMD"])
HEALTH = json.loads(IMAGE["HEALTHCHECK"].split(" CMD ")[1])
USER, GROUP = map(int, IMAGE["USER"].split(":"))
TMPFS = {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs",
         "options": ["nosuid", "nodev", "noexec", "mode=1777", "size=16m"]}


class Container:
    """A running container.  Its bundle has a read-only root with only the program;
    its network is ours."""

    def __init__(self, directory, env, mounts=(TMPFS,),
                 runtime=("crun", "--cgroup-manager=disabled")):
        self.id = "clamsmtpd-test-%d-%d" % (os.getpid(), id(self))
        self.runtime = list(runtime) + ["--root", directory + "/state"]
        self.directory = directory
        self.stderr = directory + "/stderr"
        os.makedirs(directory + "/rootfs/tmp")
        os.chmod(directory + "/rootfs/tmp", 0o1777)
        shutil.copy(CLAMSMTPD, directory + "/rootfs/clamsmtpd")
        with open(directory + "/config.json", "w") as file:
            json.dump(self.config(env, mounts), file)
        self.start()

    def start(self):
        with open(self.stderr, "wb") as err:
            self.process = subprocess.Popen(
                self.runtime + ["run", "-b", self.directory, self.id],
                stdin=subprocess.DEVNULL, stdout=err, stderr=err,
                preexec_fn=self.preexec)

    @staticmethod
    def preexec():
        """Mount only control groups of version 2.  crun does not support a machine
        that has both versions."""
        harness.mounting(("cgroup2", "/sys/fs/cgroup", "cgroup2", 0, ""))()

    @staticmethod
    def config(env, mounts):
        return {
            "ociVersion": "1.0.2",
            "root": {"path": "rootfs", "readonly": True},
            "process": {
                "args": COMMAND, "cwd": "/", "user": {"uid": USER, "gid": GROUP},
                "env": ["%s=%s" % pair for pair in dict(ENV, **env).items()],
                "capabilities": {}, "noNewPrivileges": True},
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/dev", "type": "tmpfs", "source": "tmpfs",
                 "options": ["nosuid", "mode=755", "size=65536k"]}] + list(mounts),
            "linux": {"namespaces": [
                {"type": kind} for kind in ("pid", "mount", "ipc", "uts")]}}

    def ask(self, *command):
        return subprocess.run(self.runtime + list(command), preexec_fn=self.preexec,
                              capture_output=True, text=True, timeout=2 * WAIT)

    def health(self):
        return self.ask("exec", self.id, *HEALTH)

    def log(self, pattern):
        with open(self.stderr, errors="replace") as file:
            return re.findall(pattern, file.read())

    def address(self):
        return until(lambda: self.log("listening on (.*)\n"),
                     "the daemon listens")[0]

    def pid(self):
        return json.loads(self.ask("state", self.id).stdout)["pid"]

    def terminate(self):
        self.ask("kill", self.id, "TERM")

    def close(self):
        self.ask("delete", "--force", self.id)
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


@pytest.fixture
def container(open_site, mounts):
    """container(...) starts one, between the peers of container.site."""
    if not shutil.which("crun"):
        pytest.skip("no crun here")
    with open(CLAMSMTPD, "rb") as program:
        if re.search(rb"/ld-[\w.-]+\.so", program.read()):
            pytest.skip("the program needs a loader: a special build")
    started = []

    def container(env=(), **kw):
        usual = {"CLAMSMTPD_LISTEN": "127.0.0.1:0", "CLAMSMTPD_STATUSLISTEN": "/tmp/status",
                 "CLAMSMTPD_OUTADDRESS": container.site.hop.address,
                 "CLAMSMTPD_CLAMADDRESS": container.site.clamd.address}
        directory = container.site.path("bundle%d" % len(started))
        started.append(Container(directory, dict(usual, **dict(env)), **kw))
        return started[-1]

    container.site = open_site
    open_site.clamd = open_site.new_clamd(tcp=True)
    yield container
    for one in started:
        one.close()


# ---------------------------------------------------------------- the image

def test_image_is_the_program_alone():
    last = instructions()[-1]
    assert last[0] == ("FROM", "scratch")
    assert [rest for word, rest in last if word in ("COPY", "ADD", "RUN")] == \
        ["--from=build /image/ /"]
    assert USER > 0 and GROUP > 0


@pytest.mark.skipif(not (shutil.which("musl-gcc") or shutil.which("apk")),
                    reason="only musl's programs are static")
def test_image_files_copied_are_enough_to_build(tmp_path):
    build = instructions()[0]
    files = [rest for word, rest in build if word == "COPY"][0].split()[:-1]
    for name in files:
        shutil.copy(os.path.join(TOP, name), tmp_path)
    for word, command in build:
        if word == "RUN" and not command.startswith("apt-get "):
            subprocess.run(["sh", "-c", command.replace("/image", "image")], cwd=tmp_path,
                           check=True)
    assert os.stat(tmp_path / "image/tmp").st_mode & 0o7777 == 0o1777
    program = tmp_path / "image/clamsmtpd"
    assert subprocess.check_output([program, "-v"]).startswith(b"clamsmtpd ")
    assert b"INTERP" not in subprocess.check_output(["readelf", "-l", program])


BUILD = r"""set -e
cd {work}
mkdir -p /etc/containers storage
printf '[storage]\ndriver = "vfs"\ngraphroot = "%s/storage"\nrunroot = "%s/run"\n' \
    {work} {work} >/etc/containers/storage.conf
export BUILDAH_ISOLATION=chroot
debootstrap --variant=minbase trixie base
base=$(buildah from scratch)
buildah add -q $base base /
buildah commit -q $base docker.io/library/debian:13-slim
buildah build -q --pull-never --format docker -t ours \
    -f {top}/packaging/container/Containerfile {top}
buildah build -q --pull-never --format docker -t postfix \
    -f {top}/packaging/container/Containerfile.postfix {top}/packaging/container
for image in ours postfix; do
    cp -a $(buildah mount $(buildah from --pull-never $image)) $image
    buildah inspect --type image --format '{{{{.Docker.Config.Healthcheck}}}}' $image
done
"""


@pytest.fixture(scope="module")
def images():
    """A directory with the files of both images, which buildah builds on a
    Debian made for it, and what buildah says of their health checks."""
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        pytest.skip("needs root and Debian's packages")
    with tempfile.TemporaryDirectory(prefix="clamsmtpd-test.") as work:
        os.chmod(work, 0o755)
        got = subprocess.run(
            ["tests/overlay.sh", "buildah", "debootstrap", "ca-certificates", "--",
             "sh", "-c", BUILD.format(work=work, top=TOP)],
            cwd=TOP, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if got.returncode == 77:
            pytest.skip(got.stderr.strip()[-200:])
        assert got.returncode == 0, (got.stdout + got.stderr)[-3000:]
        yield work, got.stdout


@pytest.mark.long
def test_image_as_built_is_the_program_and_an_open_tmp(images):
    """The image contains nothing else, and has its health check."""
    work, said = images
    assert sorted(os.listdir(work + "/ours")) == ["clamsmtpd", "tmp"]
    assert os.stat(work + "/ours/tmp").st_mode & 0o7777 == 0o1777
    assert "/clamsmtpd -C" in said
    shown = subprocess.check_output([work + "/ours/clamsmtpd", "-v"])
    assert shown.startswith(b"clamsmtpd ")


class Pod:
    """A network of its own with Postfix of the image in it, as the user of the
    image without capabilities, and its queue on a volume that root owns."""

    def __init__(self, root, env):
        self.root, self.env = root, env
        shutil.rmtree(root + "/var/spool/postfix")
        os.mkdir(root + "/var/spool/postfix")
        os.chown(root + "/var/spool/postfix", 0, 2525)
        os.chmod(root + "/var/spool/postfix", 0o2775)
        with open(root + "/etc/hosts", "w") as file:
            file.write("127.0.0.1 localhost clamsmtpd\n")

    def start(self):
        self.shell = subprocess.Popen(
            ["unshare", "-m", "-n", "-p", "-f", "--kill-child", "sh"], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=self.env)
        self.does("ip link set lo up; mount --bind /dev {0}/dev; mount -t proc proc {0}/proc"
                  .format(self.root))
        self.does(self.inside("postfix start-fg 2>&1 | cat >/tmp/postfix.log") + " &")
        self.does("../ours/clamsmtpd -f /nonexistent -d 3 2>../log &")
        for port in (2525, 10025, 10026):
            until(lambda: self.does("ss -Hltn sport = :%d" % port), "it listens")

    def does(self, command):
        """Run a command in the network of the pod; return its output."""
        self.shell.stdin.write("cd %s; %s\necho\necho DONE\n" % (self.root, command))
        self.shell.stdin.flush()
        lines = list(iter(self.shell.stdout.readline, "DONE\n"))
        return "".join(lines).strip()

    def inside(self, command):
        return ("chroot . setpriv --reuid 2525 --regid 2525 --clear-groups --no-new-privs "
                "--bounding-set=-all env LD_PRELOAD=/usr/local/lib/unprivileged.so "
                "sh -c %s" % shlex.quote(command))

    def mail(self, text):
        """Send a mail to Postfix in the pod, in one attempt; return the result."""
        return self.does("python3 -c %s" % shlex.quote(
            "import smtplib; s = smtplib.SMTP('127.0.0.1', 2525)\n"
            "try: print(s.sendmail('a@example.com', ['b@example.net'], %r))\n"
            "except smtplib.SMTPException as e: print(e)" % text))

    def queue(self):
        return self.does(self.inside("postqueue -p"))

    def kill(self):
        self.shell.kill()
        self.shell.communicate()


@pytest.mark.long
def test_image_of_postfix_needs_no_root_and_keeps_its_queue(images, open_site):
    """Mail goes through Postfix, clamsmtpd and Postfix again, a virus does not.
    The mail that waits in the queue is delivered after the container was killed."""
    work, _ = images
    one = Pod(work + "/postfix", dict(
        os.environ, CLAMSMTPD_OUTADDRESS="127.0.0.1:10026", CLAMSMTPD_ACTION="bounce",
        CLAMSMTPD_LISTEN="127.0.0.1:10025", CLAMSMTPD_CLAMADDRESS=open_site.clamd.address,
        CLAMSMTPD_TEMPDIRECTORY=open_site.spool))
    one.start()
    try:
        assert one.mail("Subject: well\r\n\r\nhello\r\n") == "{}"
        assert "550" in one.mail("Subject: sick\r\n\r\n%s\r\n" % EICAR.decode())
        assert one.queue().count("a@example.com") == 1
        owners = one.does("for p in proc/[0-9]*; do case $(cat $p/comm) in "
                          "master|smtpd|qmgr) grep -e Uid -e CapBnd $p/status; esac; "
                          "done | sort -u")
        assert owners.split() == ["CapBnd:", "0" * 16, "Uid:"] + ["2525"] * 4
        one.kill()
        one.start()
        assert one.queue().count("a@example.com") == 1
    finally:
        one.kill()


# ---------------------------------------------------------------- it runs

def test_container_with_the_environment_alone_filters_mail(container):
    one = container()
    client = container.site.session(address=one.address())
    client.mail()
    client.mail(body=b"Subject: sick\r\n\r\n" + EICAR + b"\r\n")
    assert len(container.site.hop.messages) == 1
    until(lambda: one.log("status=VIRUS:" + VIRUS), "the log is on stderr")
    assert not one.log("No such file|not the name of a setting")


def test_container_has_no_rights(container):
    one = container()
    one.address()
    with open("/proc/%d/status" % one.pid()) as file:
        status = dict(re.findall(r"(\w+):\t(.*)", file.read()))
    assert status["Uid"].split() == ["65534"] * 4
    assert status["Gid"].split() == ["65534"] * 4
    assert int(status["CapBnd"], 16) == int(status["CapPrm"], 16) == 0
    assert status["NoNewPrivs"] == "1"


def test_container_quarantines_in_the_tmpfs(container):
    one = container({"CLAMSMTPD_QUARANTINE": "on", "CLAMSMTPD_ACTION": "reject"})
    client = container.site.session(address=one.address())
    client.mail(body=b"\r\n" + EICAR + b"\r\n", want="550 5.7.1")
    name = until(lambda: one.log(r"quarantined virus file as: (/tmp/virus\.\w+)"),
                 "it is quarantined")[0]
    with open("/proc/%d/root%s" % (one.pid(), name), "rb") as file:
        assert EICAR in file.read()


def test_container_stopped_starts_again(container, debian_package):
    """runc gives a tmpfs the mode of the image's /tmp, at the latest from the
    second start on."""
    runc = real.find("runc") or debian_package("runc") + "/usr/sbin/runc"
    tmpfs = dict(TMPFS, options=[o for o in TMPFS["options"] if "mode=" not in o])
    one = container(mounts=(tmpfs,), runtime=(runc,))
    for _ in range(2):
        client = container.site.session(address=one.address())
        client.mail()
        client.quit()
        one.terminate()
        assert one.process.wait(WAIT) == 0
        one.close()
        one.start()
    one.address()


def test_container_without_a_tmpfs_gives_the_error(container):
    status = "127.0.0.1:%d" % container.site.port()
    one = container({"CLAMSMTPD_STATUSLISTEN": status}, mounts=())
    assert one.process.wait(WAIT) == 1
    assert one.log(r"TempDirectory: /tmp .*tmpfs.*: Read-only file system")


def test_health_is_well_while_clamd_answers(container):
    one = container()
    one.address()
    well = one.health()
    assert (well.returncode, well.stdout, well.stderr) == (0, "", "")
    container.site.clamd.down()
    # An answer is valid for a second.
    ill = until(lambda: (lambda got: got.returncode and got)(one.health()),
                "it is no longer well")
    assert ill.returncode == 1
    assert container.site.clamd.address in ill.stderr


def test_health_is_well_while_one_of_two_clamds_answers(container):
    """The restart of one clamd takes no pod out of service."""
    site = container.site
    other = site.new_clamd(tcp=True)
    one = container({"CLAMSMTPD_CLAMADDRESS": "%s\n%s" % (site.clamd.address, other.address)})
    client = site.session(address=one.address())
    site.clamd.down()
    client.mail()
    well = one.health()
    assert (well.returncode, well.stderr) == (0, "")
    other.down()
    until(lambda: one.health().returncode == 1, "it is no longer well")


def test_health_of_no_daemon_is_a_refused_connection(site, run, tmp_path):
    env = {"CLAMSMTPD_STATUSLISTEN": "127.0.0.1:%d" % site.port(),
           "CLAMSMTPD_OUTADDRESS": "127.0.0.1:25"}
    got = run("-f", str(tmp_path / "none"), "-C", env=env)
    assert got.returncode == 1
    assert "Connection refused" in got.stderr


@pytest.fixture
def busy(container):
    """A container, its client, and the scan of a message that clamd holds."""
    one = container()
    scan = container.site.clamd.verdict = Hold()
    client = container.site.session(address=one.address())
    client.begin(b"\r\nlast words\r\n.\r\n")
    scan.reached()
    return one, client, scan


def test_container_sigterm_lets_the_message_under_way_finish(container, busy):
    one, client, scan = busy
    one.terminate()
    until(lambda: one.log("stopping when"), "SIGTERM has arrived")
    scan.go()
    client.expect("250")
    client.close()
    assert one.process.wait(WAIT) == 0
    assert len(container.site.hop.messages) == 1


@pytest.mark.long
def test_container_sigterm_with_a_clamd_that_hangs_ends_it(busy):
    one, client, _ = busy
    one.terminate()
    assert one.process.wait(max(WAIT, 20)) == 0
    client.expect("421")


# ---------------------------------------------------------------- the files

def load(name):
    yaml = pytest.importorskip("yaml")
    with open(os.path.join(DIRECTORY, name)) as file:
        return list(yaml.safe_load_all(file))


def settings(run, tmp_path, env):
    """The settings in effect with only these variables and those of the image."""
    got = run("-f", str(tmp_path / "none"), "-n", env=dict(ENV, **env))
    assert (got.returncode, got.stderr) == (0, "")
    return dict(line.split(": ", 1) for line in got.stdout.splitlines()
                if not line.startswith("#"))


def test_compose_variables_are_settings(run, tmp_path):
    services = load("compose.yaml")[0]["services"]
    ours = settings(run, tmp_path, services["clamsmtpd"]["environment"])
    for setting in ("OutAddress", "ClamAddress"):
        assert ours[setting].split(":")[0] in services
    assert ours["MaxScanSize"] == str(25 << 20)


def test_compose_filter_has_a_tmpfs_and_nothing_else():
    ours = load("compose.yaml")[0]["services"]["clamsmtpd"]
    assert ours["read_only"] is True
    assert ours["cap_drop"] == ["ALL"]
    assert "volumes" not in ours
    assert [mount.split(":")[0] for mount in ours["tmpfs"]] == ["/tmp"]
    for name in ("Containerfile", "Containerfile.postfix"):
        assert os.path.exists(os.path.join(DIRECTORY, name))


def test_compose_postfix_trusts_the_network_of_the_file():
    compose = load("compose.yaml")[0]
    subnet = compose["networks"]["filter"]["ipam"]["config"][0]["subnet"]
    argument = dict(instructions("Containerfile.postfix")[-1])["ARG"]
    assert subnet in argument
    assert compose["services"]["clamsmtpd"]["networks"] == ["filter"]
    assert compose["services"]["postfix"]["ports"] == ["25:2525"]


def kubernetes(kind, name):
    """The named object of kubernetes.yaml, of which there must be one."""
    found, = [one for one in load("kubernetes.yaml")
              if (one["kind"], one["metadata"]["name"]) == (kind, name)]
    return found


def pod(name):
    return kubernetes("StatefulSet", name)["spec"]["template"]["spec"]


def containers(name):
    return pod(name).get("initContainers", []) + pod(name)["containers"]


def every_container():
    return [(name, one) for name in ("mail", "clamav") for one in containers(name)]


def sidecar():
    return pod("mail")["initContainers"][0]


def sidecar_settings(run, tmp_path):
    return settings(run, tmp_path, {one["name"]: one["value"] for one in sidecar()["env"]})


def validate(python, file):
    return subprocess.run([python, "-m", "kubernetes_validate", "--strict", file],
                          capture_output=True, text=True, timeout=4 * WAIT)


def test_kubernetes_objects_follow_the_schemas(python_with, tmp_path):
    """Kubernetes' own schemas accept each object, and refuse an unknown key."""
    python = python_with("kubernetes-validate")
    got = validate(python, os.path.join(DIRECTORY, "kubernetes.yaml"))
    assert got.returncode == 0, got.stdout + got.stderr
    with open(os.path.join(DIRECTORY, "kubernetes.yaml")) as file:
        text = file.read()
    bad = tmp_path / "bad.yaml"
    bad.write_text(text.replace("fsGroupChangePolicy:", "fsGroupPolicy:"))
    assert "'fsGroupPolicy' was unexpected" in str(validate(python, bad))


def test_kubernetes_every_container_passes_restricted():
    """Each container has what the Pod Security Standard "restricted" asks for,
    and the namespace demands it."""
    labels = kubernetes("Namespace", "mail")["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
    allowed = {"configMap", "emptyDir", "persistentVolumeClaim", "secret"}
    for name in ("mail", "clamav"):
        assert not [key for key in pod(name) if key.startswith("host") and key != "hostAliases"]
        for volume in pod(name)["volumes"]:
            assert set(volume) - {"name"} <= allowed
        context = pod(name)["securityContext"]
        assert context["runAsNonRoot"] is True
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    for name, one in every_container():
        context = one["securityContext"]
        assert context["allowPrivilegeEscalation"] is False, one["name"]
        assert context["capabilities"] == {"drop": ["ALL"]}, one["name"]
        assert context["runAsUser"] > 0 and context["runAsGroup"] > 0, one["name"]
        assert not {"privileged", "runAsNonRoot", "seccompProfile"} & set(context)


def test_kubernetes_every_container_has_probes_and_resources():
    """Each container has limits, and its three probes use ports that it has."""
    for name, one in every_container():
        ports = {port["name"] for port in one["ports"]}
        for kind in ("startup", "liveness", "readiness"):
            probe = one[kind + "Probe"]
            how = probe.get("httpGet") or probe["tcpSocket"]
            assert how["port"] in ports, (one["name"], kind)
        assert {"cpu", "memory"} <= set(one["resources"]["requests"]), one["name"]
        assert "memory" in one["resources"]["limits"], one["name"]


def test_kubernetes_sidecar_is_native():
    """The filter starts before Postfix and ends after it."""
    assert sidecar()["name"] == "clamsmtpd"
    assert sidecar()["restartPolicy"] == "Always"


def test_kubernetes_queue_outlives_the_pod():
    """Postfix's queue is on a volume claim of each pod."""
    postfix, = pod("mail")["containers"]
    mounts = {one["mountPath"]: one["name"] for one in postfix["volumeMounts"]}
    claims = kubernetes("StatefulSet", "mail")["spec"]["volumeClaimTemplates"]
    assert mounts["/var/spool/postfix"] in [one["metadata"]["name"] for one in claims]
    assert pod("mail")["securityContext"]["fsGroup"] == \
        postfix["securityContext"]["runAsGroup"]


def test_kubernetes_filter_asks_every_clamd(run, tmp_path):
    """ClamAddress has the name that a headless service gives to each pod of clamd,
    and there are two pods."""
    service = kubernetes("Service", "clamav")
    port, = service["spec"]["ports"]
    clamd = kubernetes("StatefulSet", "clamav")["spec"]
    assert clamd["replicas"] >= 2
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == clamd["selector"]["matchLabels"]
    assert clamd["serviceName"] == service["metadata"]["name"]
    env, = [one["value"] for one in sidecar()["env"] if one["name"] == "CLAMSMTPD_CLAMADDRESS"]
    assert env.split("\n") == ["clamav-%d.clamav:%d" % (i, port["port"])
                               for i in range(clamd["replicas"])]
    assert sidecar_settings(run, tmp_path)["ClamAddress"] in env.split("\n")


def test_kubernetes_status_port_is_the_one_asked(run, tmp_path):
    """The probes and Prometheus use the address of StatusListen."""
    port, = sidecar()["ports"]
    assert sidecar_settings(run, tmp_path)["StatusListen"] == \
        "0.0.0.0:%d" % port["containerPort"]
    paths = {kind: sidecar()[kind + "Probe"]["httpGet"]["path"]
             for kind in ("startup", "liveness", "readiness")}
    assert paths == {"startup": "/", "liveness": "/", "readiness": "/healthz"}
    template = kubernetes("StatefulSet", "mail")["spec"]["template"]
    annotations = template["metadata"]["annotations"]
    assert annotations["prometheus.io/port"] == str(port["containerPort"])
    assert annotations["prometheus.io/path"] == "/metrics"


def test_kubernetes_sidecar_has_a_tmpfs_and_nothing_else():
    """The filter's root is read-only, and /tmp is a volume in memory."""
    context = sidecar()["securityContext"]
    assert (context["runAsUser"], context["runAsGroup"]) == (USER, GROUP)
    assert context["readOnlyRootFilesystem"] is True
    mount, = sidecar()["volumeMounts"]
    volumes = {volume["name"]: volume for volume in pod("mail")["volumes"]}
    assert mount["mountPath"] == "/tmp"
    assert volumes[mount["name"]]["emptyDir"]["medium"] == "Memory"


def octets(size):
    number, unit = re.fullmatch(r"(\d+)([KMG]?)i?b?", size, re.I).groups()
    return int(number) << {"": 0, "K": 10, "M": 20, "G": 30}[unit.upper()]


def postfix_processes():
    """How many clients Postfix of Containerfile.postfix serves at once."""
    return int(re.search(r"'2525 inet n - n - (\d+) smtpd'",
                         dict(instructions("Containerfile.postfix")[-1])["RUN"]).group(1))


def test_kubernetes_spool_has_room_for_every_connection(run, tmp_path):
    """The largest messages on all connections fill neither the volume nor the
    container's memory.  Postfix opens no more connections than that."""
    ours = sidecar_settings(run, tmp_path)
    spool, = [one["emptyDir"]["sizeLimit"] for one in pod("mail")["volumes"]
              if one["name"] == "spool"]
    assert int(ours["MaxConnections"]) * int(ours["MaxScanSize"]) <= octets(spool)
    assert octets(spool) + (32 << 20) <= octets(sidecar()["resources"]["limits"]["memory"])
    assert int(ours["MaxConnections"]) == postfix_processes()


def test_compose_spool_has_room_for_every_connection(run, tmp_path):
    """The same for compose.yaml."""
    service = load("compose.yaml")[0]["services"]["clamsmtpd"]
    ours = settings(run, tmp_path, service["environment"])
    size = re.search(r"size=(\w+)", service["tmpfs"][0]).group(1)
    assert int(ours["MaxConnections"]) * int(ours["MaxScanSize"]) <= octets(size)
    assert int(ours["MaxConnections"]) == postfix_processes()


def selects(selector, name):
    labels = kubernetes("StatefulSet", name)["spec"]["template"]["metadata"]["labels"]
    return selector["matchLabels"] == labels


@pytest.mark.parametrize("name", ["mail", "clamav"])
def test_kubernetes_node_drained_takes_one_pod(name):
    """A PodDisruptionBudget keeps one of the two pods running."""
    budget = kubernetes("PodDisruptionBudget", name)["spec"]
    assert selects(budget["selector"], name)
    assert budget["maxUnavailable"] == 1
    assert kubernetes("StatefulSet", name)["spec"]["replicas"] > 1


def test_kubernetes_network_admits_only_the_ports_needed():
    """clamd's port is open for the filter, the status page for Prometheus, and port
    2525 for all.  Port 10026 is closed."""
    def lets(name):
        policy = kubernetes("NetworkPolicy", name)["spec"]
        assert selects(policy["podSelector"], name)
        assert policy["policyTypes"] == ["Ingress"]
        return {port["port"]: rule.get("from") for rule in policy["ingress"]
                for port in rule["ports"]}

    clamd = lets("clamav")
    assert list(clamd) == [3310]
    assert [selects(one["podSelector"], "mail") for one in clamd[3310]] == [True]
    mail = lets("mail")
    assert set(mail) == {2525, 10080}
    assert mail[2525] is None and list(mail[10080][0]) == ["namespaceSelector"]


def test_clamd_configuration_is_the_same_everywhere(run, tmp_path):
    """kubernetes.yaml contains the files that compose.yaml mounts, and clamd's
    limits match those of clamsmtpd."""
    data = kubernetes("ConfigMap", "clamav")["data"]
    mounts = load("compose.yaml")[0]["services"]["clamav"]["volumes"]
    for name in ("clamd.conf", "freshclam.conf"):
        with open(os.path.join(DIRECTORY, name)) as file:
            assert data[name] == file.read()
        assert "./%s:/etc/clamav/%s:ro" % (name, name) in mounts
    limits = re.findall(r"(?m)^(?:MaxFileSize|StreamMaxLength) (.*)$", data["clamd.conf"])
    ours = sidecar_settings(run, tmp_path)["MaxScanSize"]
    assert [octets(one) for one in limits] == [int(ours)] * 2


@pytest.mark.skipif(not shutil.which("clamconf"), reason="no clamconf here")
def test_clamd_configuration_has_no_unknown_setting():
    """ClamAV's own parser accepts the two files."""
    got = subprocess.run(["clamconf", "-c", DIRECTORY], capture_output=True, text=True)
    assert "ERROR" not in got.stdout + got.stderr, got
    for setting in ('MaxFileSize = "26214400"', 'TCPSocket = "3310"',
                    'NotifyClamd = "/etc/clamav/clamd.conf"'):
        assert setting in got.stdout, got.stdout


@pytest.mark.postfix
@pytest.mark.skipif(not real.find("postconf"), reason="no Postfix installed")
def test_postfix_settings_of_the_containerfile_are_accepted(tmp_path):
    shutil.copy("/usr/share/postfix/master.cf.dist", tmp_path / "master.cf")
    (tmp_path / "main.cf").write_text("compatibility_level = 3.6\n")
    stage = instructions("Containerfile.postfix")[-1]
    command = [rest for word, rest in stage if rest.startswith("postconf ")][0]
    command = re.split(r"&& +rm ", command)[0]
    env = dict(os.environ, MAIL_CONFIG=str(tmp_path),
               FILTERS=shlex.split(dict(stage)["ARG"])[0].partition("=")[2])
    subprocess.run(["sh", "-ec", command], env=env, check=True)
    shown = subprocess.run(["postconf", "-Mf"], env=env, check=True,
                           capture_output=True, text=True)
    assert shown.stderr == ""
    back = re.search(r"(?m)^10026 .*(\n .*)*", shown.stdout).group()
    assert "smtpd_recipient_restrictions=permit_mynetworks,reject" in back
    assert "mynetworks=127.0.0.0/8,172.30.25.0/24" in back
    assert "smtpd_proxy_filter=clamsmtpd:10025" in shown.stdout
