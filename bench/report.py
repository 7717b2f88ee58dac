"""The tables of the measurements, and the page of results.

A result is {name of a program: [Turn, ...] or Failed}.
"""

import datetime
import operator
import os
import platform
import re
import statistics

import plot
from programs import (ALONE, BUSY, CLAMD, EACH, KB, MAIN, MB, ORIGINAL, OURS, PROXY,
                      TEN, Failed, output)

TOP = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

HEAD = ("CPU us per message", "lowest-highest", "of proxy", "scanner's CPU us",
        "p50 ms", "p99 ms")
ABOUT = """\
Made by `make bench`: ClamSMTP 1.10 of Debian, a plain TCP proxy (`proxy.c`: epoll,
copies bytes, nothing else) and clamsmtpd on one machine, with a next hop that compares
every byte of every message (`sink.c`). The scanner answers at once (`scanner.c`), or is
a real clamd with one signature. The programs take turns. Figures are medians over the
turns, ratios medians of the ratios within a turn. CPU is that of the program's process
alone. p50 and p99 are of the time from the final dot to the answer.
"""


# ---------------------------------------------------------------- figures

def turns_of(result, *names):
    """Returns the turns of all these programs, or None if one has failed or is
    missing."""
    turns = [result.get(name) for name in names]
    return turns if all(isinstance(turn, list) for turn in turns) else None


def middle(result, name, field):
    turns = turns_of(result, name)
    return turns and statistics.median(getattr(turn, field) for turn in turns[0])


def ratio(result, name, other, field):
    turns = turns_of(result, name, other)
    return turns and statistics.median(getattr(one, field) / getattr(two, field)
                                       for one, two in zip(*turns))


def number(value, factor=1):
    """Returns the value with about three significant digits."""
    if value is None:
        return "-"
    if isinstance(value, Failed):
        return "FAILED: %s" % value
    if isinstance(value, int):
        return "{:,}".format(value)
    value *= factor
    digits = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 0.1 else 3
    return "{:,.{}f}".format(value, digits)


# ---------------------------------------------------------------- tables

def table(head, rows):
    """Returns a Markdown table that is also readable as text."""
    rows = [list(head)] + rows
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = ["| " + " | ".join(
        cell.ljust(width) if i == 0 else cell.rjust(width)
        for i, (cell, width) in enumerate(zip(row, widths))) + " |" for row in rows]
    lines.insert(1, "|" + "|".join(
        "-" * (width + 2) if i == 0 else "-" * (width + 1) + ":"
        for i, width in enumerate(widths)) + "|")
    return "\n".join(lines) + "\n"


def size_name(size):
    return "%d MB" % (size // MB) if size >= MB else "%d KB" % (size // KB)


def cell_name(cell):
    return "%s, {:,} at once, %s".format(cell.sessions) % (
        size_name(cell.size),
        "one session each" if cell.mode == EACH else "sessions stay open")


def lowest_highest(turns, field, factor):
    values = [getattr(turn, field) for turn in turns]
    return "%s-%s" % (number(min(values), factor), number(max(values), factor))


def cell_table(cell, result):
    rows, notes = [], ""
    for name, turns in result.items():
        if isinstance(turns, Failed):
            rows.append([name, "FAILED"] + [""] * (len(HEAD) - 1))
            notes += "\n%s FAILED: %s\n" % (name, turns)
            continue
        rows.append([
            name, number(middle(result, name, "cpu"), 1e6),
            lowest_highest(turns, "cpu", 1e6), number(ratio(result, name, PROXY, "cpu")),
            number(middle(result, name, "scanner") or None, 1e6),
            number(middle(result, name, "p50"), 1e3),
            number(middle(result, name, "p99"), 1e3)])
    return table((cell_name(cell),) + HEAD, rows) + notes


def memory_table(memory):
    """{name: {what: KiB} or Failed}"""
    head = next(one for one in memory.values() if not isinstance(one, Failed))
    return table(["KiB"] + list(head), [
        [name] + ([number(one)] + [""] * (len(head) - 1) if isinstance(one, Failed)
                  else [number(kib) for kib in one.values()])
        for name, one in memory.items()])


def calls_table(size, calls):
    """{name: Counter of system calls per message or Failed}"""
    calls = {name: one for name, one in calls.items() if not isinstance(one, Failed)}
    every = sorted({call for one in calls.values() for call in one},
                   key=lambda call: -max(one[call] for one in calls.values()))
    rows = [[call] + [number(one[call] or None) for one in calls.values()] for call in every]
    rows.append(["all"] + [number(sum(one.values())) for one in calls.values()])
    return table(["system calls per message, %s" % size_name(size)] + list(calls), rows)


def instructions_table(size, instructions):
    return table(["user-space instructions per message"] + list(instructions), [
        [size_name(size)] + [number(one) for one in instructions.values()]])


def map_table(parts, members, size):
    rows = [[name, number(held), number(zeroed)] for name, (held, zeroed)
            in sorted(parts.items(), key=lambda item: -item[1][0])]
    rest = size - sum(held for held, _ in parts.values())
    rows += [["headers, tables, padding", number(rest), ""],
             ["the file, stripped", number(size), ""]]
    return table(("part of clamsmtpd", "bytes in the file", "zeroed memory"), rows) + (
        "\nThe largest members of libc: %s.\n" % ", ".join(
            "%s %s" % (name, number(held)) for name, held in members.most_common(20)))


# ---------------------------------------------------------------- goals

def goal(what, values, shown, limit=None, reach="", holds=operator.le):
    """Returns a line of the first table.  values: the values to compare with the
    limit, by name.  shown(name): the text of a value."""
    value = values.get(OURS)
    if limit is None or OURS not in values:
        verdict = ""
    elif value is None or isinstance(value, Failed):
        verdict = "NOT MEASURED"
    else:
        verdict = "reached" if holds(value, limit) else "NOT REACHED"
    texts = {name: number(value) if value is None or isinstance(value, Failed)
             else shown(name) for name, value in values.items()}
    return what, texts, reach, verdict


def goal_table(goals, names=(ORIGINAL, PROXY, OURS)):
    return table(["", *names, "to reach", ""], [
        [what, *(texts.get(name, "-") for name in names), reach, verdict]
        for what, texts, reach, verdict in goals])


def cost(what, cell, cells, limit):
    result = cells[cell]
    values = {name: ratio(result, name, PROXY, "cpu") or turns
              for name, turns in result.items()}

    def shown(name):
        cpu = middle(result, name, "cpu")
        text = ("%s us" % number(cpu, 1e6) if cell.size < MB
                else "%s ms" % number(cpu / (cell.size // MB), 1e3))
        return text if name == PROXY else text + " (%s x)" % number(values[name])
    return goal(what, values, shown, limit, "at most %g x the TCP proxy" % limit)


def busy(cells, limit):
    """CPU with many active sessions, divided by that with few in the same turn."""
    values = {name: ratio({0: turns, 1: cells[TEN][name]}, 0, 1, "cpu") or turns
              for name, turns in cells[BUSY].items()}
    return goal("CPU per message with 1,000 active sessions, compared with 10", values,
                lambda name: "%s x" % number(values[name]), limit, "at most %g x" % limit)


def main_goals(cells):
    each, many, _, large, huge = MAIN
    return [cost("CPU per message, 2 KB, one session each", each, cells, 1.3),
            cost("CPU per message, 2 KB, sessions stay open", many, cells, 1.5),
            cost("CPU per MB, 1 MB messages", large, cells, 2),
            cost("CPU per MB, 10 MB messages", huge, cells, 2.2),
            busy(cells, 1.8)]


def latency(result):
    return goal("from the final dot to the answer, 2 KB, p50 / p99", result, lambda name:
                "%s / %s ms" % (number(middle(result, name, "p50"), 1e3),
                                number(middle(result, name, "p99"), 1e3)))


def real_clamd(what, result, parts):
    """parts(with a real clamd, without) returns the seconds in all, and of clamd."""
    values = {}
    for name in ORIGINAL, OURS:
        turns = turns_of(result, name + CLAMD, name)
        values[name] = result.get(name + CLAMD) if turns is None else [
            statistics.median(part) for part in zip(*map(parts, *turns))]
    return goal(what, values, lambda name: "%s ms, clamd %.0f %%" % (
        number(values[name][0], 1e3), 100 * max(0, values[name][1]) / values[name][0]))


def plain(what, values, unit="", limit=None, reach="", holds=operator.le):
    return goal(what, values, lambda name: number(values[name]) + unit, limit, reach, holds)


def part_of(values, key):
    """Returns {name: {key: value} or Failed} without the key."""
    return {name: one if isinstance(one, Failed) else one[key]
            for name, one in values.items()}


def pair(what, results):
    """Returns a line with two sizes.  results: [{name: number or Counter or Failed}, ...]"""
    def total(one):
        return one if isinstance(one, Failed) else round(
            sum(one.values()) if isinstance(one, dict) else one)
    return goal(what + " per message, 2 KB / 1 MB", dict.fromkeys(results[0], 0),
                lambda name: " / ".join(number(total(one[name])) for one in results))


def goals(r):
    lines = main_goals(r.cells) + [latency(r.cells[ALONE[0]])]
    for cell in ALONE:
        what, result = "real clamd, %s: " % size_name(cell.size), r.cells[cell]
        lines += [
            real_clamd(what + "from the final dot to the answer", result,
                       lambda real, quick: (real.p50, real.p50 - quick.p50)),
            real_clamd(what + "CPU per message, both programs", result,
                       lambda real, _: (real.cpu + real.scanner, real.scanner))]
    if r.instructions:
        lines.append(pair("user-space instructions", list(r.instructions.values())))
    if r.calls:
        lines.append(pair("system calls", list(r.calls.values())))
    return lines + [
        plain("resident, idle", part_of(r.memory, "idle"), " KiB", 288, "at most 288 KiB"),
        plain("resident, idle, private part", part_of(r.memory, "private part of it"), " KiB"),
        plain("resident, each further idle session",
              part_of(r.memory, "each further session"), " KiB", 2, "at most 2 KiB"),
        plain("CPU per message with 1,000 idle sessions, compared with none",
              part_of(r.idle, 1000), " x"),
        plain("share of a CPU that 5,000 idle sessions take", part_of(r.idle, 0), " %", 0.5,
              "at most 0.5 %"),
        plain("400 simultaneous connections, greeted within 5 s", r.burst, "",
              400, "400", operator.ge),
        plain("size, stripped", {OURS: r.size}, " bytes", 163840, "at most 163,840 bytes"),
        plain("messages compared at the next hop", r.sent)]


# ---------------------------------------------------------------- the page

def surroundings():
    with open("/proc/cpuinfo") as file:
        model = re.search(r"^model name\s*: (.*)", file.read(), re.M)
    commit = output("git", "-C", TOP, "rev-parse", "--short", "HEAD").strip()
    changed = output("git", "-C", TOP, "status", "--porcelain", "--", "*.c", "*.h", "Makefile")
    return "%s, commit %s%s, Linux %s, %d x %s" % (
        datetime.date.today().isoformat(), commit or "unknown",
        " with changes" if changed else "", platform.release(), os.cpu_count(),
        model.group(1) if model else platform.machine())


def main_table(cells, names):
    return goal_table(main_goals(cells), names)


def summary(r, where):
    return goal_table(goals(r)) + "\n%s\n" % where


def page(r, where):
    return "\n".join([
        "# Measurements\n", where + "\n", ABOUT, goal_table(goals(r)),
        "![plot](bench.svg)\n", "## CPU and time\n",
        *(cell_table(*one) for one in sorted(r.cells.items())),
        "## Memory\n", memory_table(r.memory), "## Size\n", map_table(*r.map, r.size)])


def drawing(r):
    def bars(cell, title, field, suffix=""):
        result = r.cells[cell]
        return title, [(name, value, number(value, 1e3) + " ms") for name, value in (
            (name, middle(result, name + suffix, field))
            for name in (ORIGINAL, OURS, PROXY)) if value]

    each, many, _, large, huge = MAIN
    small, mega = ALONE
    return plot.svg(
        [bars(each, "2 KB, one session each", "cpu"),
         bars(many, "2 KB, sessions stay open", "cpu"),
         bars(large, "1 MB", "cpu"), bars(huge, "10 MB", "cpu")],
        [bars(small, "2 KB", "p50"), bars(small, "2 KB, real clamd", "p50", CLAMD),
         bars(mega, "1 MB", "p50"), bars(mega, "1 MB, real clamd", "p50", CLAMD)])
