"""The pages in docs show the files of docs/examples as they are, and docs/messages.md
has the messages of the sources."""

import ast
import difflib
import functools
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
def test_example_file_is_on_one_page(path):
    """The first block after the link to the file has its text, on exactly one
    page."""
    link = re.escape("[%s](%s)" % (path, path))
    pages = "\0".join(read(page) for page in os.listdir(DOCS) if page.endswith(".md"))
    assert re.findall(link + "[^\0]*?\n```\n([^\0]*?)```\n", pages) == [read(path)]


@pytest.mark.parametrize("path", [p for p in FILES if p.endswith("clamsmtpd.conf")])
def test_example_configuration_has_no_error(run, path):
    """No file has an error.  Its user and directory need not exist on this
    machine."""
    done = run("-n", "-f", os.path.join(DOCS, path))
    assert (done.returncode, complaints(done)) == (0, [])


def services(text):
    """{service: its options} of a master.cf, or the settings of a main.cf."""
    text = re.sub(r"\n[ \t]+", " ", re.sub("(?m)^#.*\n", "", text))
    return {line.split(" -o ")[0].replace(" ", "").replace("=", " = ", 1): sorted(
        re.sub(r"\s", "", braced + plain)
        for braced, plain in re.findall(r"-o (?:\{(.*?)\}|(\S+))", line))
        for line in text.splitlines() if line}


def manual_postfix(where, file):
    """The services or settings that clamsmtpd.8 has for a file of Postfix."""
    with open(os.path.join(real.TOP, "clamsmtpd.8")) as page:
        section = page.read().split(".Ss Postfix, %s the queue" % where)[1]
    return services(re.search(r"%s\b.*?\n\.Bd [^\n]*\n(.*?)\n\.Ed" % file, section,
                              re.S).group(1))


@pytest.mark.covers("clamsmtpd.8 Postfix, after the queue")
@pytest.mark.parametrize("file", ["main.cf", "master.cf"])
def test_manual_postfix_after_the_queue_is_example(file):
    """clamsmtpd.8 has the settings of docs/examples, which the tests run."""
    wanted = services(read("examples/postfix-after-queue/" + file))
    assert wanted and manual_postfix("after", file) == wanted


@pytest.mark.covers("clamsmtpd.8 Postfix, before the queue")
def test_manual_postfix_before_the_queue_is_example():
    """clamsmtpd.8 has one service, and another one with one option changed."""
    option = "receive_override_options="
    second = "127.0.0.1:10026inetn-n--smtpd"
    options = [one for one in manual_postfix("after", "master.cf")[second]
               if not one.startswith(option)]
    wanted = services(read("examples/postfix-before-queue/master.cf"))
    assert wanted[second] == sorted(options + [option + "no_unknown_recipient_checks"])
    del wanted[second]
    assert wanted and manual_postfix("before", "master.cf") == wanted


# The manual pages and the tests.

PAGES = ("clamsmtpd.8", "clamsmtpd.conf.5")
# Sections that say what the program is, give advice, or have subsections.
NO_CLAUSES = ("NAME", "SYNOPSIS", "OPERATION", "EXAMPLES", "SEE ALSO", "STANDARDS",
              "HISTORY", "CAVEATS", "Large messages", "Load",
              "SETTINGS")
COMMENT = '.\\" clause: '
MACROS = ("Ar", "Cm", "Dv", "Ev", "Ic", "Li", "No", "Oc", "Oo", "Op", "Pa")


def tag(words):
    """The name of an item of a list: the words before its argument or colon."""
    name = ""
    for i, word in enumerate(words):
        if name and word in (":", "Ta", "Ar", "Op", "Oo") and words[i - 1] != "Ns":
            break
        if word not in MACROS + ("Fl", "Ns"):
            if words[i - 1] == "Fl" and i:
                word = "-" + word
            apart = name and word != "," and "Ns" not in words[max(0, i - 2):i]
            name += " " * bool(apart) + word
    return name.replace("Nm", "clamsmtpd").replace(r"\&", "").replace(r"\e", "\\").replace('"', "")


def clauses(page):
    """The clauses of a manual page: "PAGE SECTION: NAME" for each item of a list,
    by its tag, and for each comment `clause: NAME`.  A section without these is
    "PAGE SECTION".  Each setting is a clause, and also a section."""
    found, section, lists, settings = {}, None, [], False
    with open(os.path.join(real.TOP, page)) as file:
        for line in file.read().splitlines():
            macro, _, rest = line.partition(" ")
            if macro in (".Sh", ".Ss"):
                section, settings = rest, rest == "SETTINGS"
                found[section] = []
            elif macro == ".Bl":
                lists.append("-bullet" not in rest)
            elif macro == ".El":
                lists.pop()
                section = "SETTINGS" if settings and not lists else section
            elif macro == ".It" and settings and len(lists) == 1:
                section = tag(rest.split())
                found[section] = [""]
            elif macro == ".It" and lists[-1] and not rest.startswith("Em "):
                found[section].append(tag(rest.split()))
            elif line.startswith(COMMENT):
                found[section].append(line[len(COMMENT):])
    return ["%s %s%s" % (page, section, name and ": " + name)
            for section, names in found.items()
            for name in names or [""] * (section not in NO_CLAUSES)]


def covers():
    """{clause: [test]} by the markers of the tests."""
    found = {}
    for path in glob.glob(os.path.join(real.TOP, "tests", "test_*.py")):
        with open(path) as file:
            tree = ast.parse(file.read())
        for test in ast.walk(tree):
            for mark in getattr(test, "decorator_list", ()):
                if isinstance(mark, ast.Call) and ast.unparse(mark.func).endswith(
                        "mark.covers"):
                    for clause in mark.args:
                        found.setdefault(clause.value, []).append("%s:%d %s" % (
                            os.path.basename(path), mark.lineno, test.name))
    return found


@pytest.mark.parametrize("page", PAGES)
def test_manual_clause_has_a_test(page):
    """Each clause of the manual page is in the marker of a test that fails without
    it."""
    named = clauses(page)
    assert len(named) > 100 and len(set(named)) == len(named)
    marked = covers()
    missing = [clause for clause in named if clause not in marked]
    assert not missing, "no test has one of these markers:\n" + "\n".join(
        '@pytest.mark.covers("%s")' % clause for clause in missing)


def test_manual_marker_names_a_clause():
    """No marker has a clause that the manual pages do not have."""
    named = [clause for page in PAGES for clause in clauses(page)]
    wrong = ['%s covers "%s"; nearest: %s' % (
        test, clause, difflib.get_close_matches(clause, named, 1, 0))
        for clause, tests in covers().items() if clause not in named for test in tests]
    assert not wrong, "no such clause in clamsmtpd.8 or clamsmtpd.conf.5 (CONTRIBUTING" \
        ".md says how clauses are named):\n" + "\n".join(wrong)


# docs/messages.md and the sources.

SOURCES = {name: open(os.path.join(real.TOP, name)).read()
           for name in ("clamsmtpd.c", "smtp.c", "clamd.c", "conf.c", "util.c")}
LEVELS = {"LOG_ERR": "error", "LOG_WARNING": "warning", "LOG_NOTICE": "notice",
          "LOG_INFO": "info"}
STRING = r'"(?:[^"\\\n]|\\.)*"'
# These functions pass a text on to a function that logs it.
CARRIERS = ("server_lost", "server_drop", "connect_failed", "scan_failed",
            "ping_why")
HOLE = re.compile(r"%(?:0?\d+|\.\*)?(?:ll|l)?[sduxXc]")


def strings(code):
    """The string literals in a piece of C, adjacent ones joined."""
    return [re.sub(r"\\(.)", r"\1", "".join(re.findall(STRING, run))[1:-1]
                   .replace('""', ""))
            for run in re.findall(r"%s(?:\s*%s)*" % (STRING, STRING), code)]


def arguments(name):
    """The arguments of each call of a function in the sources."""
    for text in SOURCES.values():
        for call in re.finditer(r"\b%s\(" % name, text):
            args, depth, at = [""], 1, call.end()
            for token in re.finditer(STRING + r"|'\\?.'|.", text[at:], re.S):
                token = token.group()
                depth += (token == "(") - (token == ")")
                if depth == 0:
                    break
                if token == "," and depth == 1:
                    args.append("")
                else:
                    args[-1] += token
            yield args


def formats(code):
    """The formats that an expression can have.  The expression may name a constant.
    A format that ends in a colon is followed by the error."""
    found = strings(code)
    if not found and re.fullmatch(r"\s*\w+\s*", code):
        for text in SOURCES.values():
            for value in re.findall(r"\b%s\[\] = ([^;]*);" % code.strip(), text):
                found += strings(value)
    return [re.sub("^%06X: ", "", text) + (" %s" if text.endswith(":") else "")
            for text in found]


def logged():
    """{(format, level)} of all messages of the sources, except for debugging."""
    found = set()
    for name, first in ("logmsg", 0), ("slog", 1), ("die", None):
        for args in arguments(name):
            where = args[0 if first is None else first]
            levels = ["LOG_ERR"] if first is None else re.findall(r"LOG_[A-Z]+", where)
            for text in formats(args[1 if first is None else first + 1]):
                found |= {(text, LEVELS[level]) for level in levels
                          if level in LEVELS}
    # The sources build this line of two parts.
    found.remove(("%.*s, status=%s%s", "info"))
    found.add(("from=%s, to=%s, status=%s", "info"))
    return found


@functools.lru_cache(None)
def literals():
    """Each text in the sources that can be a part of a message."""
    found = {text for code in SOURCES.values() for text in strings(code)}
    return frozenset(text for text in found
                     if text == "%s: %s" or re.search("[a-z]", HOLE.sub("", text)))


@functools.lru_cache(None)
def pattern(form):
    return re.compile(".*".join(re.escape(text) for text in HOLE.split(form)))


@functools.lru_cache(None)
def fits(text, form):
    """Whether a message can come from a format.  The text for a %s must be a word
    in capitals, empty, or itself a text of the sources."""
    if not pattern(form).fullmatch(text):
        return False
    hole = HOLE.search(form)
    if hole is None:
        return True
    text, form = text[hole.start():], form[hole.end():]
    return any(fits(text[n:], form) and is_part(text[:n])
               for n in range(len(text) - len(HOLE.sub("", form)) + 1))


@functools.lru_cache(None)
def is_part(text):
    return re.fullmatch("[A-Z:]*", text) is not None or \
        any(fits(text, form) for form in literals())


def entries(levels=True):
    """[(message, levels)] of the page, or its replies, which have none."""
    rows = re.findall(r"(?m)^\| `([^`]+)` \| ([^|]*) \|.*\|.*\|$" if levels else
                      r"(?m)^\| `(\d{3} [^`]+)` \| ([^|]*) \|[^|]*\|$",
                      read("messages.md"))
    return [(text, set(level.split(" or "))) for text, level in rows
            if not levels or not re.match(r"\d{3} ", text)]


def test_messages_source_is_on_page():
    """docs/messages.md has each message of the sources, with its level."""
    page = entries()
    missing = [(form, level) for form, level in sorted(logged())
               if not any(level in levels and fits(text, form)
                          for text, levels in page)]
    assert missing == []


@pytest.mark.parametrize("name", CARRIERS + ("why",))
def test_messages_reason_is_on_page(name):
    """docs/messages.md has each reason that the sources give for a failure."""
    reasons = [form for args in arguments(name) for form in formats(args[-1])]
    if name == "why":
        for text in SOURCES.values():
            for value in re.findall(r"\bwhy = ([^;]*);", text):
                reasons += strings(value)
    assert reasons != []
    page = read("messages.md")
    assert [form for form in reasons if not pattern(form).search(page)] == []


def test_messages_page_is_in_source():
    """Each message of docs/messages.md is one of the sources, with its level."""
    forms = logged()
    page = entries()
    assert len(page) > 100
    wrong = [(text, level) for text, levels in page for level in levels
             if not any(at == level and fits(text, form) for form, at in forms)]
    assert wrong == []


def test_messages_replies_are_on_page():
    """docs/messages.md has each reply of our own, and no other."""
    replies = re.findall(r"\br_\w+\[\] =\s*((?:%s\s*)+)" % STRING, SOURCES["smtp.c"])
    forms = [form for code in replies for form in strings(code)]
    assert len(forms) > 25
    page = [text for text, _ in entries(levels=False)
            if text != "220 smtp.passthru"]		# the next hop's code
    assert [form for form in forms if not any(fits(text, form) for text in page)] == []
    assert [text for text in page if not any(fits(text, form) for form in forms)] == []
