"""Configurations as the distributions shipped them with ClamSMTP 1.10.  -n reads
each of them.  With addresses of the test, each relays mail.

Debian's configuration is that of its package.  Alpine's APKBUILD adds two settings
to the sample of ClamSMTP.  Fedora's file is known only from a Puppet module, and
its directories from the spec file.  The FreeBSD port has the sample unchanged, and
-p in its start script.
"""

import os

import pytest

from harness import BAD, GOOD, HEADER, VIRUS, complaints, effective


# The settings that the sample of ClamSMTP has in comments.
SAMPLE = {
    "MaxConnections": "64", "TimeOut": "180", "KeepAlives": "0", "XClient": "off",
    "Listen": "0.0.0.0:10025", "ClamAddress": "/var/run/clamav/clamd",
    "Header": "X-Virus-Scanned: ClamAV using ClamSMTP", "TempDirectory": "/tmp",
    "Action": "drop", "Quarantine": "off", "TransparentProxy": "off", "User": "clamav",
    "VirusAction": "/path/to/some/script.sh",
}

# name: (settings, settings in comments, command line)
FILES = {
    "Debian": (
        {"OutAddress": "10025", "Listen": "127.0.0.1:10026",
         "ClamAddress": "/var/run/clamav/clamd.ctl",
         "TempDirectory": "/var/spool/clamsmtp",
         "PidFile": "/var/run/clamsmtp/clamsmtpd.pid", "User": "clamsmtp"},
        {"MaxConnections": "64", "TimeOut": "180", "Bounce": "off", "Quarantine": "off",
         "Header": "X-AV-Checked: ClamAV using ClamSMTP", "TransparentProxy": "off"},
        []),
    "Alpine": (
        {"OutAddress": "10026", "ClamAddress": "/var/run/clamav/clamd.sock",
         "User": "clamav"},
        SAMPLE, []),
    "Fedora": (
        {"OutAddress": "10026", "ClamAddress": "/var/run/clamd.clamsmtp/clamd.sock",
         "TempDirectory": "/var/lib/clamd.clamsmtp",
         "PidFile": "/var/run/clamsmtpd/clamsmtpd.pid", "User": "clamsmtp"},
        SAMPLE, []),
    "FreeBSD": (
        {"OutAddress": "10026"},
        SAMPLE, ["-p", "/var/run/clamav/clamsmtpd.pid"]),
    # the older names of Header and Action
    "older": (
        {"OutAddress": "127.0.0.1:10026", "ClamAddress": "127.0.0.1:3310",
         "ScanHeader": "X-AV-Checked: ClamAV using ClamSMTP", "Bounce": "on"},
        SAMPLE, []),
}
OLD_NAMES = {"ScanHeader": "Header", "Bounce": "Action"}
MEANS = {("Bounce", "on"): "bounce", ("Bounce", "off"): "drop"}


@pytest.fixture(params=FILES)
def shipped(request):
    return FILES[request.param]


def text_of(settings):
    return "".join("%s: %s\n" % item for item in settings.items())


@pytest.mark.core
@pytest.mark.parametrize("all_of_it", [False, True], ids=["as it is", "comments too"])
def test_old_configuration_n_prints_the_settings(run, tmp_path, shipped, all_of_it):
    """-n also has a warning for each name that is now deprecated, and no other
    complaint."""
    settings, offered, args = shipped
    if all_of_it:
        settings = {**{n: v for n, v in offered.items()
                       if OLD_NAMES.get(n, n) not in [OLD_NAMES.get(s, s) for s in settings]},
                    **settings}
    file = tmp_path / "clamsmtpd.conf"
    file.write_text("# as shipped\n\n" + text_of(settings))
    got = run("-n", "-f", str(file), *args)
    shown = effective(got)
    for name, value in settings.items():
        want = MEANS.get((name, value), value)
        assert shown[OLD_NAMES.get(name, name).lower()] == [want], name
    if args:
        assert shown["pidfile"] == [args[1]]
    warnings = complaints(got)
    used = [name for name in OLD_NAMES if name in settings]
    assert len(warnings) == len(used)
    for name in used:
        line, = (l for l in warnings
                 if " %s is deprecated, use %s" % (name, OLD_NAMES[name]) in l)
        line_number = text_of(settings).split("\n").index(
            "%s: %s" % (name, settings[name])) + 3
        assert "%s:%d: " % (file, line_number) in line


@pytest.mark.core
def test_old_configuration_relays_mail(site, shipped):
    """A port alone as OutAddress leads to the client's address, as before."""
    settings, _, args = shipped
    ours = {
        "Listen": "127.0.0.1:0", "ClamAddress": site.clamd.address,
        "TempDirectory": site.spool, "User": None, "PidFile": None,
        "OutAddress": str(site.hop.port) if settings["OutAddress"].isdigit()
        else site.hop.address,
    }
    if "PidFile" in settings:
        ours["PidFile"] = site.path("pid")
    site.start(args=["-p", site.path("pid")] if args else [], **{**settings, **ours})
    assert os.path.exists(site.path("pid")) == bool(args or "PidFile" in settings)
    client = site.session()
    client.mail(body=GOOD)
    header = settings.get("ScanHeader")
    added = b"%s\r\n" % header.encode() if header else HEADER
    assert site.hop.messages[0].body == GOOD.replace(b"\r\n\r\n", b"\r\n" + added + b"\r\n", 1)
    client.mail(body=BAD, want="550" if settings.get("Bounce") == "on" else
                "250 2.0.0 Virus Detected; Discarded Email")
    client.quit()
    assert len(site.hop.messages) == 1
    site.daemon.wait_log("status=VIRUS:%s$" % VIRUS)
