"""The container.  There is no engine here: crun runs the program as the
Containerfile says, in a bundle that this file makes."""

import json
import os
import re
import shlex
import shutil
import subprocess

import pytest

import harness
import real
from harness import CLAMSMTPD, EICAR, TOP, VIRUS, WAIT, Hold, until

DIRECTORY = os.path.join(TOP, "packaging", "container")


def instructions(name="Containerfile"):
    """Its (instruction, rest) pairs, a list for each stage."""
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
    """A bundle with a read-only root of the program alone, and it running.
    The network is ours."""

    def __init__(self, directory, env, mounts=(TMPFS,)):
        self.id = "clamsmtpd-test-%d-%d" % (os.getpid(), id(self))
        self.crun = ["crun", "--root", directory + "/state",
                     "--cgroup-manager=disabled"]
        self.stderr = directory + "/stderr"
        os.makedirs(directory + "/rootfs")
        shutil.copy(CLAMSMTPD, directory + "/rootfs/clamsmtpd")
        with open(directory + "/config.json", "w") as file:
            json.dump(self.config(env, mounts), file)
        with open(self.stderr, "wb") as err:
            self.process = subprocess.Popen(
                self.crun + ["run", "-b", directory, self.id],
                stdin=subprocess.DEVNULL, stdout=err, stderr=err,
                preexec_fn=self.preexec)

    @staticmethod
    def preexec():
        """crun knows no machine that has both kinds of control groups."""
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
        return subprocess.run(self.crun + list(command), preexec_fn=self.preexec,
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

def test_the_image_is_the_program_alone():
    last = instructions()[-1]
    assert last[0] == ("FROM", "scratch")
    assert [rest for word, rest in last if word in ("COPY", "ADD", "RUN")] == \
        ["--from=build /src/clamsmtpd /clamsmtpd"]
    assert USER > 0 and GROUP > 0


@pytest.mark.skipif(not (shutil.which("musl-gcc") or shutil.which("apk")),
                    reason="only musl's programs are static")
def test_what_is_copied_is_enough_to_build_it(tmp_path):
    build = instructions()[0]
    files = [rest for word, rest in build if word == "COPY"][0].split()[:-1]
    for name in files:
        shutil.copy(os.path.join(TOP, name), tmp_path)
    for word, command in build:
        if word == "RUN" and not command.startswith("apk "):
            subprocess.run(["sh", "-c", command], cwd=tmp_path, check=True)
    program = tmp_path / "clamsmtpd"
    assert subprocess.check_output([program, "-v"]).startswith(b"clamsmtpd ")
    assert b"INTERP" not in subprocess.check_output(["readelf", "-l", program])


# ---------------------------------------------------------------- it runs

def test_it_starts_from_the_environment_alone_and_takes_a_mail(container):
    one = container()
    client = container.site.session(address=one.address())
    client.mail()
    client.mail(body=b"Subject: sick\r\n\r\n" + EICAR + b"\r\n")
    assert len(container.site.hop.messages) == 1
    until(lambda: one.log("status=VIRUS:" + VIRUS), "the log is on stderr")
    assert not one.log("No such file|not the name of a setting")


def test_it_has_no_rights(container):
    one = container()
    one.address()
    with open("/proc/%d/status" % one.pid()) as file:
        status = dict(re.findall(r"(\w+):\t(.*)", file.read()))
    assert status["Uid"].split() == ["65534"] * 4
    assert status["Gid"].split() == ["65534"] * 4
    assert int(status["CapBnd"], 16) == int(status["CapPrm"], 16) == 0
    assert status["NoNewPrivs"] == "1"


def test_a_virus_is_quarantined_in_the_tmpfs(container):
    one = container({"CLAMSMTPD_QUARANTINE": "on", "CLAMSMTPD_ACTION": "reject"})
    client = container.site.session(address=one.address())
    client.mail(body=b"\r\n" + EICAR + b"\r\n", want="550 5.7.1")
    name = until(lambda: one.log(r"quarantined virus file as: (/tmp/virus\.\w+)"),
                 "it is quarantined")[0]
    with open("/proc/%d/root%s" % (one.pid(), name), "rb") as file:
        assert EICAR in file.read()


def test_without_a_tmpfs_it_says_so(container):
    one = container({"CLAMSMTPD_STATUSLISTEN": "127.0.0.1:0"}, mounts=())
    assert one.process.wait(WAIT) == 1
    assert one.log(r"TempDirectory: /tmp .*tmpfs.*: No such file or directory")


def test_health_is_well_while_clamd_answers(container):
    one = container()
    one.address()
    well = one.health()
    assert (well.returncode, well.stdout, well.stderr) == (0, "", "")
    container.site.clamd.down()
    # An answer is good for a second.
    ill = until(lambda: (lambda got: got.returncode and got)(one.health()),
                "it is no longer well")
    assert ill.returncode == 1
    assert container.site.clamd.address in ill.stderr


def test_health_of_no_daemon_is_a_refused_connection(site, run, tmp_path):
    env = {"CLAMSMTPD_STATUSLISTEN": "127.0.0.1:%d" % site.port(),
           "CLAMSMTPD_OUTADDRESS": "127.0.0.1:25"}
    got = run("-f", str(tmp_path / "none"), "-C", env=env)
    assert got.returncode == 1
    assert "Connection refused" in got.stderr


@pytest.fixture
def busy(container):
    """A container with a message at clamd: it, its client, the scan."""
    one = container()
    scan = container.site.clamd.verdict = Hold()
    client = container.site.session(address=one.address())
    client.begin(b"\r\nlast words\r\n.\r\n")
    scan.reached()
    return one, client, scan


def test_sigterm_lets_the_message_under_way_finish(container, busy):
    one, client, scan = busy
    one.terminate()
    until(lambda: one.log("stopping when"), "SIGTERM is heard")
    scan.go()
    client.expect("250")
    client.close()
    assert one.process.wait(WAIT) == 0
    assert len(container.site.hop.messages) == 1


@pytest.mark.long
def test_sigterm_ends_it_even_if_clamd_hangs(busy):
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
    """The settings in effect with these variables alone, and the image's."""
    got = run("-f", str(tmp_path / "none"), "-n", env=dict(ENV, **env))
    assert (got.returncode, got.stderr) == (0, "")
    return dict(line.split(": ", 1) for line in got.stdout.splitlines()
                if not line.startswith("#"))


def clamd_limits(env):
    return {env["CLAMD_CONF_MaxFileSize"], env["CLAMD_CONF_StreamMaxLength"]}


def test_compose_sets_what_clamsmtpd_knows(run, tmp_path):
    services = load("compose.yaml")[0]["services"]
    ours = settings(run, tmp_path, services["clamsmtpd"]["environment"])
    for setting in ("OutAddress", "ClamAddress"):
        assert ours[setting].split(":")[0] in services
    assert clamd_limits(services["clamav"]["environment"]) == {"25M"}
    assert ours["MaxScanSize"] == str(25 << 20)


def test_compose_gives_it_a_tmpfs_and_nothing_else():
    ours = load("compose.yaml")[0]["services"]["clamsmtpd"]
    assert ours["read_only"] is True
    assert ours["cap_drop"] == ["ALL"]
    assert "volumes" not in ours
    assert [mount.split(":")[0] for mount in ours["tmpfs"]] == ["/tmp"]
    for name in ("Containerfile", "Containerfile.postfix"):
        assert os.path.exists(os.path.join(DIRECTORY, name))


def test_compose_trusts_the_network_that_postfix_is_told_of():
    compose = load("compose.yaml")[0]
    subnet = compose["networks"]["filter"]["ipam"]["config"][0]["subnet"]
    told = dict(instructions("Containerfile.postfix")[0])["ARG"]
    assert subnet in told
    assert compose["services"]["clamsmtpd"]["networks"] == ["filter"]
    assert compose["services"]["postfix"]["ports"] == ["25:25"]


def pod():
    return load("kubernetes.yaml")[0]["spec"]["template"]


def sidecar():
    return pod()["spec"]["initContainers"][0]


def test_kubernetes_sets_what_clamsmtpd_knows(run, tmp_path):
    ours = settings(run, tmp_path,
                    {one["name"]: one["value"] for one in sidecar()["env"]})
    clamd, service = load("kubernetes.yaml")[2:]
    assert ours["ClamAddress"] == "%s:%d" % (service["metadata"]["name"],
                                             service["spec"]["ports"][0]["port"])
    env = clamd["spec"]["template"]["spec"]["containers"][0]["env"]
    assert clamd_limits({one["name"]: one["value"] for one in env}) == {"25M"}
    assert ours["MaxScanSize"] == str(25 << 20)


def test_kubernetes_asks_the_status_port(run, tmp_path):
    ours = settings(run, tmp_path,
                    {one["name"]: one["value"] for one in sidecar()["env"]})
    port = sidecar()["ports"][0]
    assert ours["StatusListen"] == "0.0.0.0:%d" % port["containerPort"]
    probes = {kind: sidecar()[kind + "Probe"]["httpGet"]
              for kind in ("startup", "liveness", "readiness")}
    assert {probe["port"] for probe in probes.values()} == {port["name"]}
    assert [probes[kind]["path"] for kind in sorted(probes)] == \
        ["/", "/healthz", "/"]
    annotations = pod()["metadata"]["annotations"]
    assert annotations["prometheus.io/port"] == str(port["containerPort"])
    assert annotations["prometheus.io/path"] == "/metrics"


def test_kubernetes_gives_it_a_tmpfs_and_nothing_else():
    context = sidecar()["securityContext"]
    assert (context["runAsUser"], context["runAsGroup"]) == (USER, GROUP)
    assert context["readOnlyRootFilesystem"] is True
    assert context["allowPrivilegeEscalation"] is False
    assert context["capabilities"] == {"drop": ["ALL"]}
    mount, = sidecar()["volumeMounts"]
    volumes = {volume["name"]: volume for volume in pod()["spec"]["volumes"]}
    assert mount["mountPath"] == "/tmp"
    assert volumes[mount["name"]]["emptyDir"]["medium"] == "Memory"


@pytest.mark.postfix
@pytest.mark.skipif(not real.find("postconf"), reason="no Postfix installed")
def test_postfix_understands_its_containerfile(tmp_path):
    shutil.copy("/usr/share/postfix/master.cf.dist", tmp_path / "master.cf")
    (tmp_path / "main.cf").write_text("compatibility_level = 3.6\n")
    stage = instructions("Containerfile.postfix")[0]
    command = [rest for word, rest in stage if rest.startswith("postconf ")][0]
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
