"""What the measurements say: tables, and the page of results.

A result is {name of a program: [Turn, ...] or Failed}.
"""

import datetime
import operator
import os
import platform
import re
import statistics

import plot
from programs import (EACH, KB, MB, NONE, ORIGINAL, OURS, PROXY, SIZES, SOURCE_EACH,
                      SOURCE_MANY, Failed, output)

TOP = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

HEAD = ("CPU us a message", "lowest-highest", "of proxy", "messages/s",
        "lowest-highest", "of no filter", "p50 ms", "p99 ms")
GOALS = ("", ORIGINAL, PROXY, OURS, "to reach", "")
ABOUT = """\
Made by `make bench`: ClamSMTP 1.10 of Debian, a plain TCP proxy (`proxy.c`: epoll,
copies bytes, nothing else) and clamsmtpd on one machine, with a scanner that answers
at once (`scanner.c`) and a next hop that compares every byte of every message
(`sink.c`). The programs take turns; figures are medians over the turns, ratios medians
of the ratios within a turn. CPU is that of the program's process alone; p50 and p99
are of the time from the final dot to the answer. The original is left out where large
messages come 1, 50 or 200 at once, 10 MB messages come at most 10 at once.
"""


# ---------------------------------------------------------------- figures

def turns_of(result, *names):
    """The turns of all these, or None if one has failed or is missing."""
    turns = [result.get(name) for name in names]
    return turns if all(isinstance(turn, list) for turn in turns) else None


def middle(result, name, field):
    turns = turns_of(result, name)
    values = [getattr(turn, field) for turn in turns[0]] if turns else [None]
    return None if None in values else statistics.median(values)


def ratio(result, name, other, field):
    turns = turns_of(result, name, other)
    return turns and statistics.median(getattr(one, field) / getattr(two, field)
                                       for one, two in zip(*turns))


def idle_ratio(curve, name, point):
    """What CPU a message is of that without idle sessions, or Failed."""
    one, two = (middle(curve[at], name, "cpu") for at in (point, 0))
    return one / two if one and two else curve[point].get(name)


def number(value, factor=1):
    """Three digits or so that matter."""
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
    """A Markdown table that reads well as text, too."""
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
    return "%s, %d at once, %s%s" % (
        size_name(cell.size), cell.sessions,
        "a session each" if cell.mode in (EACH, SOURCE_EACH) else "many a session",
        ", smtp-source" if cell.mode in (SOURCE_EACH, SOURCE_MANY) else "")


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
        cpu = ["", "", ""] if name == NONE else [
            number(middle(result, name, "cpu"), 1e6), lowest_highest(turns, "cpu", 1e6),
            number(ratio(result, name, PROXY, "cpu"))]
        rows.append([name] + cpu + [
            number(middle(result, name, "rate")), lowest_highest(turns, "rate", 1),
            number(ratio(result, name, NONE, "rate")),
            number(middle(result, name, "p50"), 1e3),
            number(middle(result, name, "p99"), 1e3)])
    return table((cell_name(cell),) + HEAD, rows) + notes


def idle_table(curve):
    names, rows = list(curve[0]), []
    for point, result in curve.items():
        row = [number(point)]
        for name in names:
            cpu = middle(result, name, "cpu")
            row += [number(result[name]), ""] if cpu is None else [
                number(cpu, 1e6), number(idle_ratio(curve, name, point))]
        rows.append(row)
    head = ["idle sessions beside 10 active"]
    for name in names:
        head += ["%s: CPU us a message" % name, "of that without"]
    return table(head, rows)


def memory_table(memory):
    """{name: {what: KiB} or Failed}"""
    head = next(one for one in memory.values() if not isinstance(one, Failed))
    return table(["KiB"] + list(head), [
        [name] + ([number(one)] + [""] * (len(head) - 1) if isinstance(one, Failed)
                  else [number(kib) for kib in one.values()])
        for name, one in memory.items()])


def calls_table(size, calls):
    """{name: Counter of system calls a message or Failed}"""
    calls = {name: one for name, one in calls.items() if not isinstance(one, Failed)}
    every = sorted({call for one in calls.values() for call in one},
                   key=lambda call: -max(one[call] for one in calls.values()))
    rows = [[call] + [number(one[call] or None) for one in calls.values()] for call in every]
    rows.append(["all"] + [number(sum(one.values())) for one in calls.values()])
    return table(["system calls a message, %s" % size_name(size)] + list(calls), rows)


def instructions_table(size, instructions):
    return table(["user-space instructions a message"] + list(instructions), [
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
    """A line of the first table.  values: what is compared with the limit, by
    name; shown: how a value reads."""
    value = values.get(OURS)
    if limit is None:
        verdict = ""
    elif value is None or isinstance(value, Failed):
        verdict = "NOT MEASURED"
    else:
        verdict = "reached" if holds(value, limit) else "NOT REACHED"
    texts = [number(values.get(name)) if isinstance(values.get(name), (Failed, type(None)))
             else shown(name) for name in (ORIGINAL, PROXY, OURS)]
    return [what, *texts, reach, verdict]


def cost(what, result, limit, messages=1):
    values = {name: ratio(result, name, PROXY, "cpu") or turns
              for name, turns in result.items()}
    factor, unit = (1e6, "us") if what.startswith("CPU a message") else (1e3, "ms")

    def shown(name):
        text = "%s %s" % (number(middle(result, name, "cpu") / messages, factor), unit)
        return text if name == PROXY else text + " (%s x)" % number(values[name])
    return goal(what, values, shown, limit, "at most %g x the TCP proxy" % limit)


def rate(what, result, limit):
    values = {name: ratio(result, name, NONE, "rate") or turns
              for name, turns in result.items()}
    return goal(what, values, lambda name: "%s (%s/s)" % (
        number(values[name]), number(middle(result, name, "rate"))),
        limit, "at least %g of no filter" % limit, operator.ge)


def rates(client, results):
    return [rate("messages/s, %s (%s)" % (what, client), result, 0.35)
            for what, result in zip(("2 KB, 10 at once, a session each",
                                     "2 KB, 10 at once, sessions stay open",
                                     "1 MB, 10 at once, a session each"), results)]


def plain(what, values, unit="", limit=None, reach="", holds=operator.le):
    return goal(what, values, lambda name: number(values[name]) + unit, limit, reach, holds)


def part_of(values, key):
    """{name: {key: value} or Failed} without the key"""
    return {name: one if isinstance(one, Failed) else one[key]
            for name, one in values.items()}


def pair(what, results, reach):
    """For information: two sizes in one line."""
    def shown(name):
        return " / ".join(number(round(sum(one[name].values()) if isinstance(one[name], dict)
                                       else one[name])) for one in results)
    values = {name: next((one[name] for one in results if isinstance(one[name], Failed)), 0)
              for name in results[0]}
    return goal("for information: %s a message, 2 KB / 1 MB" % what, values, shown,
                reach=reach)


def goals(r):
    alone = {name: middle(r.cells[r.alone], name, "rate") or turns
             for name, turns in r.cells[r.alone].items()}
    each, many, large, huge = (r.cells[cell] for cell in r.main)
    lines = [
        cost("CPU a message, 2 KB, a session each", each, 1.5),
        cost("CPU a message, 2 KB, sessions stay open", many, 1.8),
        cost("CPU a MB, 1 MB messages", large, 2),
        cost("CPU a MB, 10 MB messages", huge, 2, 10),
        *rates("smtp-source", [r.cells[cell] for cell in r.by_source]),
        *rates("load.c", (each, many, large)),
        plain("one session, one after the other, ordinary TCP (smtp-source)", alone,
              "/s", 1000, "over 1,000 a second", operator.gt)]
    if r.instructions:
        lines.append(pair("user-space instructions", list(r.instructions.values()),
                          "some 30,000 / 1 million"))
    if r.calls:
        lines.append(pair("system calls", list(r.calls.values()), "some 80 / 200"))
    lines += [
        plain("resident, idle", part_of(r.memory, "idle"), " KiB", 256, "at most 256 KiB"),
        plain("for information: of it private", part_of(r.memory, "of it private"), " KiB"),
        plain("resident, a further idle session", part_of(r.memory, "a further session"),
              " KiB", 4, "at most 4 KiB")]
    if 1000 in r.curve:
        lines.append(plain(
            "1,000 idle sessions beside 10 active: CPU a message",
            {name: idle_ratio(r.curve, name, 1000) for name in r.curve[1000]},
            " x", 4, "at most 4 x that without them"))
    return lines + [
        plain("400 connections in the same instant, greeted within 5 s", r.burst, "",
              400, "400", operator.ge),
        plain("size, stripped", {OURS: r.size}, " bytes", 163840, "at most 163,840"),
        plain("messages compared at the next hop", r.sent),
        plain("of them not intact, lost or doubled", r.failed, "", 0, "none")]


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


def summary(r, where):
    return table(GOALS, goals(r)) + "\n%s\n" % where


def page(r, where):
    parts = ["# Measurements\n", where + "\n", ABOUT, table(GOALS, goals(r)),
             "![plot](bench.svg)\n"]
    for size in SIZES:
        parts.append("## %s\n" % size_name(size))
        parts += [cell_table(cell, result) for cell, result in r.cells.items()
                  if cell.size == size]
    parts += ["## Idle sessions\n", idle_table(r.curve),
              "## Memory\n", memory_table(r.memory)]
    if r.calls or r.instructions:
        parts.append("## System calls and instructions\n")
        parts += [calls_table(*one) for one in r.calls.items()]
        parts += [instructions_table(*one) for one in r.instructions.items()]
    parts += ["## Size\n", map_table(*r.map, r.size)]
    return "\n".join(parts)


def drawing(r):
    def bars(field, factor, unit):
        return [(title, [(name, value, number(value, factor) + unit) for name, value in (
            (name, middle(r.cells[cell], name, field))
            for name in (ORIGINAL, OURS, PROXY, NONE)) if value])
            for title, cell in zip(("2 KB, a session each", "2 KB, many a session",
                                    "1 MB", "10 MB"), r.main)]

    lines, stops = [], {}
    for name in r.curve[0]:
        values = [(point, middle(result, name, "cpu")) for point, result in r.curve.items()]
        lines.append((name, [(point, cpu * 1e6) for point, cpu in values if cpu]))
        stops[name] = next((point for point, cpu in values if not cpu), None)
    return plot.svg(bars("cpu", 1e3, " ms"), bars("rate", 1, "/s"), lines, stops)
