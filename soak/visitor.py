"""A visitor that requests the status page all the time, in good and bad ways."""

import re
import time

from conn import Conn
from harness import Gone, connect
from plan import dice, pick

KINDS = {"whole": 6, "dripped": 1, "half": 1, "unread": 1, "endless": 1}
PAGES = {"/": rb"HTTP/1.0 200 (.*\n)+\Z", "/metrics": rb"HTTP/1.0 200 (.*\n)+\Z",
         "/healthz": rb"HTTP/1.0 (200|503) (.*\n)+\Z"}


class Visitor:
    def __init__(self, world):
        self.world, self.accounts = world, world.accounts

    def run(self):
        number = 0
        while not self.world.over:
            number += 1
            r = dice(self.world.seed, "visit", number)
            time.sleep(r.random() * .1)
            ends = self.world.ends
            if not self.world.up or "stop" in self.world.windows:
                continue
            kind, page = pick(r, KINDS), r.choice(list(PAGES))
            try:
                answer = self.visit(kind, page)
            except (OSError, Gone):
                answer = b""
            if kind in ("whole", "dripped") and ends == self.world.ends and \
                    not re.match(PAGES[page], answer):
                self.accounts.fail("unexplained", "status page %s, %s: %r" % (
                    page, kind, answer[:200]))

    def visit(self, kind, page):
        with connect(self.world.status) as sock:
            c = Conn(self.world, sock)
            return self.talk(c, kind, b"GET %s HTTP/1.0\r\n\r\n" % page.encode())

    def talk(self, c, kind, request):
        self.accounts.inject("visitor: " + kind)
        if kind == "half":
            request = request[:len(request) // 2]
        if kind == "endless":
            request = b"GET /" + b"x" * 5000
        if kind == "dripped":
            c.drip(request)
        else:
            c.send(request)
        if kind in ("half", "unread"):
            return None
        try:
            while True:
                c.fill()
        except Gone:
            return bytes(c.ahead)
