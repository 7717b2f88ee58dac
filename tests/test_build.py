"""The Makefile, as a packager uses it."""

import os
import re
import shutil
import subprocess

import pytest

from harness import TOP, WAIT

FLAGS = ("CC", "CPPFLAGS", "CFLAGS", "LDFLAGS", "PREFIX", "SYSCONFDIR", "HARDEN",
         "STATIC", "DESTDIR", "MAKEFLAGS", "MAKELEVEL")

pytestmark = pytest.mark.skipif(not shutil.which("readelf"), reason="no readelf here")


def sh(command, *args, env=(), cwd=TOP):
    clean = {name: value for name, value in os.environ.items()
             if name not in FLAGS}
    return subprocess.run(["sh", "-c", command, "sh", *map(str, args)], cwd=cwd,
                          env=dict(clean, **dict(env)), check=True,
                          capture_output=True, text=True).stdout


def readelf(program):
    return sh('readelf -W -h -l -d "$1"', program)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """sources(name): a directory with a copy of what make needs."""
    def sources(name):
        where = tmp_path_factory.mktemp(name)
        sh('cp Makefile ./*.[ch] ./*.[58] clamsmtpd.conf "$1"', where)
        return where
    return sources


@pytest.fixture(scope="module")
def built(sources):
    where = sources("built")
    sh("make -s", cwd=where)
    return where


@pytest.mark.parametrize("given", ["environment", "command line"])
def test_flags_given_are_used(given):
    """CC, CPPFLAGS, CFLAGS and LDFLAGS replace the defaults of the Makefile."""
    flags = {"CC": "cc -v", "CPPFLAGS": "-DONE", "CFLAGS": "-O1", "LDFLAGS": "-L/two"}
    command = "make -n -B BIN=new"
    if given == "environment":
        line = sh(command, env=flags)
    else:
        line = sh(command + ' "$@"', *("%s=%s" % flag for flag in flags.items()))
    assert re.match(r"cc -v -std=c99 .* -DONE -O1 -o new .* -L/two$", line.strip())


def test_paths_in_the_environment_are_used(built, tmp_path):
    """The installation uses PREFIX and SYSCONFDIR of the environment."""
    env = {"PREFIX": "/opt/filter", "SYSCONFDIR": "/opt/etc"}
    assert "-DCONFFILE='\"/opt/etc/clamsmtpd.conf\"'" in sh("make -n -B", env=env)
    sh('make -s install DESTDIR="$1"', tmp_path, env=env, cwd=built)
    assert (tmp_path / "opt/filter/sbin/clamsmtpd").exists()
    assert (tmp_path / "opt/etc/clamsmtpd.conf").exists()


def test_compiler_default_is_musl_gcc_or_cc(tmp_path):
    """The Makefile uses musl-gcc by default, or cc if there is no musl-gcc."""
    (tmp_path / "tools").mkdir()
    for tool in ("make", "sh", "cc", "gcc", "grep", "printf", "as", "ld"):
        if shutil.which(tool):
            (tmp_path / "tools" / tool).symlink_to(shutil.which(tool))
    path = {"PATH": str(tmp_path / "tools")}
    assert sh("make -n -B BIN=new", env=path).startswith("cc ")
    musl = tmp_path / "tools" / "musl-gcc"
    musl.symlink_to(shutil.which("true"))
    assert sh("make -n -B BIN=new", env=path).startswith(str(musl))


def test_default_build_is_hardened(built):
    """RELRO and BIND_NOW hold, and a static program is a PIE where the compiler
    can link one."""
    elf = readelf(built / "clamsmtpd")
    assert "GNU_RELRO" in elf
    assert "BIND_NOW" in elf or "no dynamic section" in elf
    assert not re.search(r"GNU_STACK.*RWE", elf)
    if "INTERP" in elf:
        return
    compiler = sh("make -s -n -B BIN=new", cwd=built).split()[0]
    (built / "pie.c").write_text("int main(void) { return 0; }\n")
    sh('"$1" -fPIE -static-pie -o pie pie.c', compiler, cwd=built)
    if "INTERP" not in readelf(built / "pie"):
        assert re.search(r"Type: +DYN", elf)


def test_build_with_a_packagers_flags_is_hardened(built):
    """A packager's CFLAGS and LDFLAGS switch off neither the stack protector, nor
    RELRO, nor BIND_NOW."""
    sh("make -s BIN=theirs", env={"CFLAGS": "-O1", "LDFLAGS": "-Wl,-O1"}, cwd=built)
    elf = readelf(built / "theirs")
    assert "GNU_RELRO" in elf and "BIND_NOW" in elf
    assert "__stack_chk_fail" in sh("readelf -W --dyn-syms theirs", cwd=built)


def test_build_for_a_router_is_smaller(built):
    """The variables that the Makefile names for a router build a working program
    that is smaller."""
    with open(os.path.join(TOP, "Makefile")) as file:
        lines = re.search(r"^# Smaller.*\n((?:# +.*\n)+?)\n", file.read(), re.M)
    command = re.search(r"make HARDEN.*", lines.group(1).replace("\\\n#", ""), re.S)
    sh(command.group().strip() + " BIN=small", cwd=built)
    assert sh("./small -v", cwd=built) == sh("./clamsmtpd -v", cwd=built)
    assert (built / "small").stat().st_size < (built / "clamsmtpd").stat().st_size


def test_build_twice_gives_the_same_bytes(built, sources):
    """A build in another directory, at another time, gives the same file."""
    again = sources("a-directory-with-a-longer-name")
    sh("make -s", cwd=again)
    assert (again / "clamsmtpd").read_bytes() == (built / "clamsmtpd").read_bytes()


def test_install_makes_these_files(built, tmp_path):
    """make install creates the program, two pages and the configuration, for all
    to read whatever the umask, and leaves an existing configuration alone."""
    sh('umask 077; make -s install DESTDIR="$1"', tmp_path, cwd=built)
    found = sh("find . ! -type d -exec stat -c '%a %n' {} + | sort", cwd=tmp_path)
    assert found.splitlines() == [
        "644 ./etc/clamsmtpd.conf",
        "644 ./usr/local/share/man/man5/clamsmtpd.conf.5",
        "644 ./usr/local/share/man/man8/clamsmtpd.8",
        "755 ./usr/local/sbin/clamsmtpd"]
    assert set(sh("find etc usr -type d -exec stat -c %a {} +",
                  cwd=tmp_path).split()) == {"755"}
    config = tmp_path / "etc/clamsmtpd.conf"
    config.write_text("mine\n")
    sh('make -s install DESTDIR="$1"', tmp_path, cwd=built)
    assert config.read_text() == "mine\n"


# Each file may use what is defined further down, as the comment at the head of
# clamsmtpd.h says.
LAYERS = ("clamsmtpd", "smtp", "conf", "clamd", "util")


@pytest.mark.skipif(not shutil.which("nm"), reason="no nm here")
def test_calls_between_source_files_run_downwards(sources):
    """No file uses a function or variable of a file above it."""
    where = sources("layers")
    for name in LAYERS:
        sh("make -s BIN=$1.o SRC=$1.c LDFLAGS=-c", name, cwd=where)
    symbols = {name: re.findall(r"^(\w+) (\w)", sh("nm -P $1.o", name, cwd=where), re.M)
               for name in LAYERS}
    layer = {symbol: LAYERS.index(name) for name in LAYERS
             for symbol, kind in symbols[name] if kind in "BDRTV"}
    assert layer["main"] == 0 and layer["slog"] == len(LAYERS) - 1
    upwards = ["%s.c uses %s of %s.c" % (name, symbol, LAYERS[layer[symbol]])
               for name in LAYERS for symbol, kind in symbols[name]
               if kind == "U" and layer.get(symbol, len(LAYERS)) < LAYERS.index(name)]
    assert not upwards


def test_mutations_change_a_text_of_the_sources():
    """Each entry of tests/mutants has a text that its file contains exactly once,
    and names tests that exist.  With a word that no entry has, tests/mutants checks
    only this."""
    done = subprocess.run([os.path.join(TOP, "tests", "mutants"), "-q", "no such word"],
                          capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stdout


@pytest.mark.parametrize("number, others", [
    ("-1", "8, 9, 10, 11, 12, 13, 14, 15"), ("0", "8, 9, 10, 11, 12, 13, 14, 15"),
    ("17", "16")])
def test_soak_show_of_a_message_that_no_plan_has_is_an_error(number, others):
    """The error names messages that exist.  A run begins with message 8, and each
    session has eight numbers, but not always eight messages."""
    def show(message):
        return subprocess.run([os.path.join(TOP, "soak", "run"), "--seed", "1",
                               "--show", message], capture_output=True, text=True,
                              timeout=WAIT)
    done = show(number)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.endswith("error: --show: seed 1 has no message %s; it has %s and "
                                "others\n" % (number, others))
    for other in others.split(", "):
        assert show(other).stdout.startswith("message %s (" % other)
