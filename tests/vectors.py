"""Vectors of SMTP smuggling, slow and simple models of how servers read them, and
hostile text.  This module uses no socket."""

import itertools
import re

from harness import shown, stuff

# Byte strings that some server has taken for the end of a line.
ENDS = {
    "CRLF": b"\r\n", "LF": b"\n", "CR": b"\r", "CRCRLF": b"\r\r\n",
    "LFCR": b"\n\r", "CRNULLF": b"\r\0\n", "NULCRLF": b"\0\r\n",
    "CRLFNUL": b"\r\n\0",
}
PAIRS = list(itertools.product(ENDS, ENDS))

HEAD = b"Subject: first\r\n\r\ntext"
# With these the dot is in the header, or on the very first line.
OTHER_HEADS = (b"Subject: first", b"")
OTHER_DOTS = (b"..", b"\0.", b".\0", b".\0.", b"\0..\0")
NOTHING = b""
SECOND = (b"MAIL FROM:<evil@example.com>\r\nRCPT TO:<victim@example.com>\r\n"
          b"DATA\r\nSubject: smuggled\r\n\r\nsmuggled")
TAILS = (NOTHING, SECOND)


class Vector:
    """A body that contains something like an end of data.  Its last line has no line
    end: a test that sends it with DATA adds CRLF.CRLF."""

    def __init__(self, before, after, tail=NOTHING, dot=b".", head=HEAD):
        self.name = "%s %r %s in %r%s" % (before, dot, after, head[-8:],
                                          " with a second envelope" * bool(tail))
        self.head, self.middle = head, dot
        self.start = len(head)                  # where the end of data begins
        between = ENDS[before] + dot + ENDS[after]
        self.dot = self.start + len(ENDS[before])
        self.dot_end = self.dot + len(dot)
        self.end = self.start + len(between)    # and where it ends
        self.body = head + between + tail

    def cuts(self):
        """Eight ways to send the body in pieces, each as the offsets of its cuts.  The
        last one sends single bytes around the dot and at the end."""
        return [(self.start,), (self.start + 1,), (self.dot,), (self.dot_end,),
                (self.end - 1,), (self.end,), (self.dot, self.dot_end),
                (*range(self.start, self.end + 2),
                 *range(len(self.body), len(self.body) + 5))]

    def all_cuts(self, everywhere):
        """One cut at each place around the dot (or everywhere, up to the end of data),
        and two cuts at any two places around the dot."""
        places = range(max(1, self.start - 1), self.end + 2)
        ones = range(1, len(self.body) + 5) if everywhere else places
        return [(at,) for at in ones] + list(itertools.combinations(places, 2))


def vectors(before, after):
    """All bodies for a pair of line ends."""
    for tail in TAILS:
        yield Vector(before, after, tail)
        for dot in OTHER_DOTS:
            yield Vector(before, after, tail, dot)
        for head in OTHER_HEADS:
            yield Vector(before, after, tail, head=head)


def pieces(data, cuts):
    cuts = [0, *sorted(c for c in set(cuts) if 0 < c < len(data)), len(data)]
    return [data[a:b] for a, b in zip(cuts, cuts[1:])]


# ------------------------------------------------- what must arrive

def normal(body):
    """A body after the newline rules of the manual page, applied line by line."""
    out = []
    lines = body.split(b"\n")
    rest = lines.pop()              # has no LF at its end
    for line in lines:
        out.append(normal_line(line.rstrip(b"\r")) + b"\r\n")
    if rest:
        out.append(normal_line(rest) + b"\r\n")
    return b"".join(out)


def header_place(body, received=False):
    """The place of the daemon's header in a normalised body: (offset, separator).
    The separator is CRLF if the header needs an empty line below it, else b"".
    With received=True the header is a Received: header."""
    top = re.match(rb"(>*From [^\n]*\n)*", body).end()
    field = rb"[!-9;-~]+[ \t]*:[^\n]*\n([ \t][^\n]*\n)*(?![ \t])"
    head = re.compile(rb"(%s)*" % field).match(body, top)
    return top if received else head.end(), b"\r\n" if body[top:top + 1] in (b" ", b"\t") else b""


def normal_line(line):
    line = line.replace(b"\r", b" ")
    if line.lstrip(b"\0").startswith(b"."):
        line = line.lstrip(b"\0")
    return line


def strict(stream):
    """The model of a server that ends DATA only at CRLF.CRLF, without the newline
    rules.  Returns three lists: the codes of its replies, the messages that it
    accepts as (sender, how, body), and the places where a client has to wait for a
    reply, as (bytes of the stream so far, codes so far)."""
    codes, messages, stops = [], [], []
    size_all = len(stream)
    sender = rcpts = chunks = None
    while stream:
        line, lf, stream = stream.partition(b"\n")
        assert lf, "half a command: %r" % line
        if line.endswith(b"\r"):
            line = line[:-1]
        verb = line.split(b" ")[0].upper()
        if verb == b"DATA":
            stops.append((size_all - len(stream), len(codes) + 1))
        if re.match(rb"[^A-Za-z \t]", line):
            codes.append("554")
            break
        if b"\r" in line or b"\0" in line:
            codes.append("501")
        elif verb == b"MAIL":
            sender, rcpts, chunks = line, 0, b""
            codes.append("250")
        elif verb == b"RCPT":
            codes.append("503" if sender is None else "250")
            rcpts = None if sender is None else rcpts + 1
        elif verb == b"DATA" and rcpts:
            codes += ["354", "250"]
            body = b""
            while True:
                text, crlf, stream = stream.partition(b"\r\n")
                assert crlf, "no end of data"
                if text == b".":
                    break
                body += (text[1:] if text[:1] == b"." else text) + b"\r\n"
            messages.append((sender, "DATA", body))
            sender = rcpts = None
        elif verb == b"BDAT" and rcpts:
            size = int(line.split()[1])
            assert len(stream) >= size
            chunks, stream = chunks + stream[:size], stream[size:]
            codes.append("250")
            if len(line.split()) == 3:
                messages.append((sender, "BDAT", chunks))
                sender = rcpts = None
        else:
            codes.append("503" if verb in (b"DATA", b"BDAT") else "500")
    return codes, messages, stops


# ------------------------------------------------- next hops

LAX = [(a, b) for a in (b"\r\n", b"\n", b"\r") for b in (b"\r\n", b"\n", b"\r")]


def after_end(text, ends):
    """The text after the first end of data, or None if there is no end.  An end is a
    dot between one of the pairs in `ends'."""
    found = []
    for before, after in ends:
        if text.startswith(b"." + after):
            found.append(1 + len(after))
        at = text.find(before + b"." + after)
        if at >= 0:
            found.append(at + len(before) + 1 + len(after))
    return text[min(found):] if found else None


def after_end_line(text, is_end):
    """The same for a server that reads lines and tests each with is_end()."""
    while text:
        line, _, text = text.partition(b"\n")
        if is_end(line):
            return text
    return None


def cr_is_lf(text):
    return text.replace(b"\r", b"\n")


def crlf_is_lf_then_cr(text):
    return text.replace(b"\r\n", b"\n").replace(b"\r", b"\n")


def no_cr(text):
    return text.replace(b"\r", b"")


def no_nul(text):
    return text.replace(b"\0", b"")


BARE = [(b"\n", b"\n")]

# Each returns the bytes after the first message, which it would read as commands.
NEXT_HOPS = {
    "strict": lambda d: after_end(d, [(b"\r\n", b"\r\n")]),
    "LF.LF": lambda d: after_end(d, [(b"\r\n", b"\r\n"), (b"\n", b"\n")]),
    "LF.CRLF": lambda d: after_end(d, [(b"\n", b"\r\n")]),
    "CRLF.LF": lambda d: after_end(d, [(b"\r\n", b"\r\n"), (b"\r\n", b"\n")]),
    "CR.CR": lambda d: after_end(d, [(b"\r\n", b"\r\n"), (b"\r", b"\r")]),
    "CRLF.CR": lambda d: after_end(d, [(b"\r\n", b"\r\n"), (b"\r\n", b"\r")]),
    "any of them": lambda d: after_end(d, LAX),
    "CR becomes LF": lambda d: after_end(cr_is_lf(d), BARE),
    "CRLF, then CR become LF": lambda d: after_end(crlf_is_lf_then_cr(d), BARE),
    "drops CR": lambda d: after_end(no_cr(d), BARE),
    "drops NUL": lambda d: after_end(no_nul(d), LAX),
    "drops NUL, CR becomes LF": lambda d: after_end(cr_is_lf(no_nul(d)), BARE),
    "drops NUL and CR": lambda d: after_end(no_cr(no_nul(d)), BARE),
    "C strings": lambda d: after_end_line(
        d, lambda l: l.rstrip(b"\r").split(b"\0")[0] == b"."),
    "C strings, CR gone later": lambda d: after_end_line(
        d, lambda l: l.split(b"\0")[0].rstrip(b"\r") == b"."),
    "C strings, CR is LF": lambda d: after_end_line(
        cr_is_lf(d), lambda l: l.split(b"\0")[0] == b"."),
    "trims line ends": lambda d: after_end_line(
        d, lambda l: l.rstrip(b" \t\r\0") == b"."),
}


def smuggled(wire):
    """The models that find more or less than one message in the bytes that the daemon
    sent after 354, dot included: {name: the bytes after the first message}."""
    found = {}
    for name, hop in NEXT_HOPS.items():
        rest = hop(wire)
        if rest is None or rest.strip(b"\r\n"):
            found[name] = rest and shown(rest, 80)
    return found


def sent(body):
    """A body as it is sent after 354."""
    return stuff(body) + b".\r\n"


# ------------------------------------------------- random bodies

ATOMS = (b"\r\n", b"\r\n", b"\r\n", b"\r\n.", b"\r\n..", b"\r\n\r\n", b".", b"..",
         b"\n", b"\r", b"\r\r\n", b"\n\r", b"\0", b"\r\n\0.", b"\n.\n", b"\r.\r",
         b"a", b"word ", b"\xe4\xff", b":", b" ", b"\t", b"From ", b">", b"A: b\r\n",
         b"a line as it is usual in mail, a bit longer than the others\r\n",
         b"x" * 997)


def random_body(random, most=200000):
    """A body of 1 to about `most' bytes without an end of data.  Small sizes are as
    likely as large ones."""
    size = int(most ** random.random())
    atoms = random.sample(ATOMS, random.randint(2, len(ATOMS)))
    mean = sum(map(len, atoms)) / len(atoms)
    body = b""
    while len(body) < size:
        body += b"".join(random.choices(atoms, k=int(size / mean) + 8))
    body = body[:size]
    while body.startswith(b".\r\n") or b"\r\n.\r\n" in body:
        body = stuff(body) if body.startswith(b".\r\n") else body.replace(
            b"\r\n.\r\n", b"\r\n..\r\n")
    return body


# ------------------------------------------------- hostile text

# Without NUL, CR and LF, which no command may contain.
CONTROLS = bytes(c for c in range(1, 32) if c not in b"\r\n") + b"\x7f"
TEXTS = {
    "control characters": CONTROLS,
    "escape sequences": b"\x1b]0;x\x07\x1b[2J\x1b[1;1H\x08\x08",
    "C1 controls": b"\xc2\x9b31m\xc2\x9d0;x\xc2\x9c\x9b2J\x85\xc2\x80\xc2\x9f\xc2",
    "UTF-8": "Gr\u00fc\u00dfe\u20ac\U0001f4e7\u00a0\u0416".encode(),
    "format": b"%s%s%n%n%99999999d%1$s%*d%hhn%x%p%%%",
    "quotes": b"'\"\\\"''`\\",
    "shell": b"$(touch$IFS@)`touch$IFS@`;touch$IFS@|touch$IFS@&touch$IFS@",
    "invalid UTF-8": b"\xff\xfe\xc3(\xed\xa0\x80\xf8\x88\x80\x80\x80\xc0\xaf",
    "a line of the log": b"100001: from=x@y, to=z, status=CLEAN",
    "a variable": b"LD_PRELOAD=/tmp/x.so",
    "a header": b"X-Virus-Scanned: no",
    "10 KB": b"x%s@" * 2560,
    "10 KB of control characters": b"\x1b\x01\t" * 3413,
    "10 KB of UTF-8": "\u20ac".encode() * 3413,
    "10 KB of invalid UTF-8": b"\xff\x80" * 5120,
}
