"""The pages in docs show the files of docs/examples as they are."""

import glob
import os
import re

import pytest

import real
from harness import complaints

DOCS = os.path.dirname(real.EXAMPLES)
FILES = sorted(os.path.relpath(path, DOCS)
               for path in glob.glob(real.EXAMPLES + "/**", recursive=True)
               if os.path.isfile(path))


def read(path):
    with open(os.path.join(DOCS, path)) as file:
        return file.read()


@pytest.mark.parametrize("path", FILES)
def test_shown(path):
    """In the first block behind the link, on one page."""
    link = re.escape("[%s](%s)" % (path, path))
    pages = "\0".join(read(page) for page in os.listdir(DOCS) if page.endswith(".md"))
    assert re.findall(link + "[^\0]*?\n```\n([^\0]*?)```\n", pages) == [read(path)]


@pytest.mark.parametrize("path", [p for p in FILES if p.endswith("clamsmtpd.conf")])
def test_configuration(run, path):
    """Each has no error; its user and directory need not exist on this machine."""
    done = run("-n", "-f", os.path.join(DOCS, path))
    assert (done.returncode, complaints(done)) == (0, [])
