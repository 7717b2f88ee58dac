"""packaging/monitoring: the alert rules, the dashboard, and its curves, with a
Prometheus that asks a real daemon."""

import importlib.machinery
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
import xml.etree.ElementTree

import pytest

import real
from harness import TOP, until

DIRECTORY = os.path.join(TOP, "packaging", "monitoring")


def path(name):
    return os.path.join(DIRECTORY, name)


def dashboard():
    with open(path("dashboard.json")) as file:
        return json.load(file)


def curves():
    """The script curves as a module."""
    loader = importlib.machinery.SourceFileLoader("curves", path("curves"))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("curves", loader))
    sys.dont_write_bytecode = True
    loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def programs(debian_package):
    """The paths of prometheus and promtool."""
    if real.find("prometheus") and real.find("promtool"):
        return "prometheus", "promtool"
    main = debian_package("prometheus") + "/usr/bin/"
    if os.path.exists(main + "promtool"):
        return main + "prometheus", main + "promtool"
    return main + "prometheus", debian_package("promtool") + "/usr/bin/promtool"


# ---------------------------------------------------------------- the rules

def test_rules_each_alert_fires_for_its_condition(programs):
    """promtool runs alerts.test.yml, in which each alert fires in one case and is
    silent in another."""
    got = subprocess.run([programs[1], "test", "rules", "alerts.test.yml"], cwd=DIRECTORY,
                         capture_output=True, text=True)
    assert got.returncode == 0, got.stdout + got.stderr


def test_rules_every_alert_is_tested():
    """alerts.test.yml contains every alert."""
    with open(path("alerts.yml")) as file:
        alerts = set(re.findall(r"- alert: (\w+)", file.read()))
    with open(path("alerts.test.yml")) as file:
        fired = set(re.findall(r"alertname: (\w+)\n +exp_alerts:\n", file.read()))
    assert alerts == fired and len(alerts) > 5


def test_configuration_of_prometheus_has_no_error(programs):
    """promtool accepts prometheus.yml and the rules that it names."""
    got = subprocess.run([programs[1], "check", "config", path("prometheus.yml")],
                         capture_output=True, text=True)
    assert got.returncode == 0, got.stdout + got.stderr
    assert "rules found" in got.stdout


# ---------------------------------------------------------------- the dashboard

@pytest.fixture
def prometheus(site, programs):
    """A Prometheus that asks the daemon each second, at prometheus.url."""
    class Prometheus:
        pass

    one = Prometheus()
    status = "127.0.0.1:%d" % site.port()
    one.daemon = site.start(StatusListen=status, MaxConnections="2")
    listen = "127.0.0.1:%d" % site.port()
    one.url = "http://" + listen
    os.mkdir(site.path("prometheus"))
    shutil.copy(path("alerts.yml"), site.path("prometheus"))
    with open(path("prometheus.yml")) as file:
        text = file.read().replace("15s", "1s").replace("mail.example.com:10080", status)
    with open(site.path("prometheus/prometheus.yml"), "w") as file:
        file.write(text)
    with open(site.path("prometheus/log"), "w") as log:
        process = subprocess.Popen(
            [programs[0], "--config.file=" + site.path("prometheus/prometheus.yml"),
             "--storage.tsdb.path=" + site.path("prometheus/data"),
             "--web.listen-address=" + listen],
            stdout=log, stderr=log, preexec_fn=real.die_with_us)
    yield one
    process.kill()
    process.wait()


def answer(prometheus, query):
    try:
        return curves().ask(prometheus.url, "query", query=query)
    except urllib.error.URLError as error:
        if isinstance(error, urllib.error.HTTPError) and error.code != 503:
            raise
        return []                       # it is not ready yet


def expressions():
    return [(panel["title"], target["expr"]) for panel in dashboard()["panels"]
            for target in panel["targets"]]


def test_dashboard_every_query_has_an_answer(site, prometheus):
    """After a mail, a virus, a failed scan and a refused client each query of each
    panel has a result."""
    client = site.session()
    site.session()
    site.client().expect("421")
    until(lambda: answer(prometheus, "clamsmtpd_sessions_refused_total == 1"),
          "Prometheus has seen the refused client")
    client.mail()
    site.clamd.verdict = ["sick ERROR"]
    client.mail(want="451")

    def counted(query):
        return float(answer(prometheus, query)[0]["value"][1])

    until(lambda: counted("sum(clamsmtpd_messages_total)") == 2, "it has seen the messages")
    for title, expr in expressions():
        query = curves().expression(expr)
        assert "$" not in query, title
        until(lambda: answer(prometheus, query), title)
    rates = curves().expression(
        'sum(rate(clamsmtpd_messages_total{job="$job"}[$__rate_interval]))')
    until(lambda: counted(rates) > 0, "a rate is there")


def test_dashboard_has_every_metric_that_there_is(site):
    """Each metric of the daemon is in a panel, and each metric in a panel is one of
    the daemon."""
    status = "127.0.0.1:%d" % site.port()
    site.start(StatusListen=status)
    with urllib.request.urlopen("http://%s/metrics" % status) as page:
        there = set(re.findall(r"# TYPE (clamsmtpd_\w+) ", page.read().decode()))
    shown = {re.sub("_bucket$", "", name) for _, expr in expressions()
             for name in re.findall(r"clamsmtpd_\w+", expr)}
    assert shown == there
    with open(path("alerts.yml")) as file:
        asked = {re.sub("_bucket$", "", name)
                 for name in re.findall(r"\b(clamsmtpd_\w+)", file.read())}
    assert asked <= there


SVG = "{http://www.w3.org/2000/svg}"


def has_all_curves(picture):
    """Whether the picture has the panels with a curve, in the dashboard's order."""
    titles = [text.text.partition(" (")[0] for text in picture.iter(SVG + "text")
              if text.get("class") == "title"]
    return titles == [panel["title"] for panel in dashboard()["panels"]
                      if panel["type"] == "timeseries"]


def test_picture_has_the_panels_of_the_dashboard():
    """dashboard.svg, which the page shows, is not older than the dashboard."""
    assert has_all_curves(xml.etree.ElementTree.parse(path("dashboard.svg")))


def test_curves_are_drawn_from_prometheus(site, prometheus):
    """curves makes a picture of each panel with a curve."""
    client = site.session()
    client.mail()
    until(lambda: answer(prometheus, 'clamsmtpd_messages_total{verdict="clean"} == 1'),
          "Prometheus has seen the mail")
    end = float(curves().ask(prometheus.url, "query", query="time()")[1])
    with open(path("dashboard.json")) as file:
        drawn = subprocess.run([path("curves"), prometheus.url, str(end - 60), str(end)],
                               stdin=file, capture_output=True, text=True)
    assert drawn.returncode == 0, drawn.stderr
    picture = xml.etree.ElementTree.fromstring(drawn.stdout)
    assert has_all_curves(picture)
    lines = list(picture.iter(SVG + "polyline"))
    assert any(line.get("points") for line in lines)
