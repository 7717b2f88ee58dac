"""tests/interop/run, which is run by hand, with one client and one server."""

import os
import re
import subprocess

import pytest

from harness import CLAMSMTPD, TOP

RUN = os.path.join(TOP, "tests/interop/run")


def cells(tables, name):
    """The rows that begin with this name, without it."""
    return [[cell.strip() for cell in row.split("|")]
            for row in re.findall(r"(?m)^\| %s \| (.*) \|$" % re.escape(name), tables)]


def test_interop_one_client_and_one_server_are_alike_through_the_filter(
        as_root, tmp_path):
    """A client's messages have the same results directly and through the daemon.  The
    server takes one message for two directly, and none through the daemon."""
    file = tmp_path / "tables"
    got = subprocess.run(
        [RUN, "-c", "Python smtplib", "-s", "qpsmtpd", "-o", str(file)],
        env=dict(os.environ, CLAMSMTPD=CLAMSMTPD), capture_output=True, text=True)
    if got.returncode == 77:
        pytest.skip(got.stderr.strip())
    assert got.returncode == 0, got.stderr
    tables = file.read_text()
    assert cells(tables, "Python smtplib") == [["6"]], tables
    (direct, through, *_), = cells(tables, "qpsmtpd")
    assert int(direct) > 0 and through == "0", tables
    assert re.search("qpsmtpd: first messages that arrived: .*'through': 58", tables)
