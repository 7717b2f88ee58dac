"""A real clamd, which must find in a mail what it finds in a file."""

import itertools
import os
import stat
import time

import pytest

import harness
import real
from harness import Client, HEADER
from real import CLEAN, EICAR, EICAR_NAME, FILES_NAME

pytestmark = pytest.mark.skipif(not real.find("clamd"),
                                reason="no clamd installed")

REJECTED = "550 5.7.1 Virus Detected; Content Rejected (%s)"
EICAR_MAILS = {
    "plain": real.HEADERS + b"\r\n" + EICAR + b"\r\n",
    "base64": real.attached(EICAR, "eicar.com"),
    "zipped": real.attached(real.zipped(EICAR), "eicar.zip"),
    "no final newline in it": real.attached(EICAR + b"\n" * 3, "eicar.txt"),
}


@pytest.fixture(scope="session")
def clamd():
    clamd = real.RealClamd()
    yield clamd
    clamd.close()


@pytest.fixture
def own_clamd():
    """own_clamd(Setting="value"): starts a clamd for this test alone."""
    made = []

    def make(**settings):
        made.append(real.RealClamd(**settings))
        return made[-1]
    yield make
    for clamd in made:
        clamd.close()


@pytest.fixture(params=["unix", "tcp"])
def address(request, clamd):
    return clamd.path if request.param == "unix" else clamd.tcp


def forwarded(mail, header=HEADER):
    """The mail as the next hop should receive it."""
    head, _, body = mail.partition(b"\r\n\r\n")
    return head + b"\r\n" + header + b"\r\n" + body


# ---------------------------------------------------------------- verdicts

@pytest.mark.core
@pytest.mark.parametrize("kind", EICAR_MAILS)
def test_eicar_in_each_form_is_found(site, address, kind):
    site.start(ClamAddress=address, Action="bounce")
    client = site.session()
    client.mail(body=EICAR_MAILS[kind], want=REJECTED % EICAR_NAME)
    client.quit()
    assert site.hop.messages == []
    site.daemon.wait_log("^100000: from=a@example.com, to=b@example.com, "
                         "status=VIRUS:" + EICAR_NAME + "$")


@pytest.mark.core
def test_clean_mail_of_each_kind_passes(site, address):
    site.start(ClamAddress=address)
    client = site.session()
    client.mail(body=CLEAN)
    client.quit()
    message, = site.hop.messages
    harness.same(message.body, forwarded(CLEAN), "the mail")
    site.daemon.wait_log("status=CLEAN$")


def test_virus_between_clean_mails_is_found(site, address):
    """In one session the verdict on one mail does not affect the next one."""
    site.start(ClamAddress=address, Action="drop")
    client = site.session()
    for _ in range(3):
        client.mail(body=CLEAN)
        client.mail(body=EICAR_MAILS["base64"],
                    want="250 2.0.0 Virus Detected; Discarded Email")
    client.quit()
    assert len(site.hop.messages) == 3
    for message in site.hop.messages:
        harness.same(message.body, forwarded(CLEAN), "the mail")


def test_virus_with_action_pass_is_marked(site, address):
    site.start(ClamAddress=address, Action="pass")
    client = site.session()
    mail = EICAR_MAILS["zipped"]
    client.mail(body=mail)
    client.quit()
    message, = site.hop.messages
    harness.same(message.body, forwarded(
        mail, b"X-Virus-Infected: %s\r\n" % EICAR_NAME.encode()), "the mail")


def test_virus_across_chunks_is_found(site, address):
    """Two chunks of BDAT each have a part of the virus."""
    site.hop = site.new_hop(chunking=True)
    site.start(ClamAddress=address, Action="bounce")
    client = site.session()
    mail = EICAR_MAILS["plain"]
    client.envelope()
    cut = mail.index(EICAR) + 30
    client.chunk(mail[:cut])
    client.expect("250")
    client.chunk(mail[cut:], last=True)
    client.expect(REJECTED % EICAR_NAME)
    client.mail(body=CLEAN)
    client.quit()
    assert len(site.hop.messages) == 1


@pytest.mark.parametrize("name", real.test_files())
def test_file_of_each_type_is_found_in_mail(site, clamd, name):
    """If clamd finds a file, it also finds a mail with this file."""
    path = os.path.join(real.FILES, name)
    if FILES_NAME + " FOUND" not in clamd.scan_path(path):
        pytest.skip("this clamd does not find it in the file either")
    with open(path, "rb") as file:
        mail = real.attached(file.read(), name)
    site.start(ClamAddress=clamd.path, Action="bounce")
    client = site.session()
    client.mail(body=mail, want=REJECTED % FILES_NAME)
    client.quit()


@pytest.mark.long
@pytest.mark.parametrize("name", real.test_files())
def test_file_over_tcp_is_found(site, clamd, name):
    path = os.path.join(real.FILES, name)
    with open(path, "rb") as file:
        mail = real.attached(file.read(), name)
    if FILES_NAME + " FOUND" not in clamd.scan(mail):
        pytest.skip("this clamd does not find it in the mail")
    site.start(ClamAddress=clamd.tcp, Action="bounce")
    client = site.session()
    client.mail(body=mail, want=REJECTED % FILES_NAME)
    client.quit()


def test_mails_at_the_same_time_get_their_own_verdicts(site, address):
    """Each mail of 12 sessions gets its own verdict."""
    site.start(ClamAddress=address, Action="bounce")

    def one(number):
        client = site.session()
        for turn in range(4):
            if (number + turn) % 2:
                client.mail(body=EICAR_MAILS["zipped"], want=REJECTED % EICAR_NAME)
            else:
                client.mail("%d.%d@example.com" % (number, turn), body=CLEAN)
        client.quit()
    harness.at_once(one, 12)
    senders = sorted(m.mail for m in site.hop.messages)
    assert senders == sorted("MAIL FROM:<%d.%d@example.com>" % (n, t)
                             for n in range(12) for t in range(4)
                             if (n + t) % 2 == 0)


# ---------------------------------------------------------------- access

@pytest.mark.covers("clamsmtpd.conf.5 ClamAddress: INSTREAM")
def test_clamd_without_access_to_the_spool_scans(site, clamd):
    """clamd needs no access to the spool, unlike with commands that name a file."""
    if not clamd.user:
        pytest.skip("clamd runs as the same user here")
    os.chmod(site.spool, 0o700)
    path = os.path.join(site.spool, "probe")
    with open(path, "wb") as file:
        file.write(EICAR)
    assert "ERROR" in clamd.scan_path(path), "clamd can read the directory"
    os.unlink(path)
    site.start(ClamAddress=clamd.path, Action="bounce")
    client = site.session()
    client.mail(body=EICAR_MAILS["base64"], want=REJECTED % EICAR_NAME)
    client.mail(body=CLEAN)
    client.quit()


def test_quarantine_copy_is_the_mail_as_sent(site, clamd):
    """The copy is the mail as it was sent, and only its owner can read it."""
    site.start(ClamAddress=clamd.path, Action="drop", Quarantine="on")
    client = site.session()
    mail = EICAR_MAILS["base64"] + b"\r\n.\r\n..\r\n.end\r\n"
    client.mail(body=mail, want="250 2.0.0 Virus Detected; Discarded Email")
    client.quit()
    path = real.quarantined(site)
    assert os.path.basename(path).startswith("virus.")
    with open(path, "rb") as file:
        harness.same(file.read(), mail, "the quarantined mail")
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600


@pytest.mark.covers("clamsmtpd.8 A false positive")
def test_false_positive_with_its_signature_ignored_is_delivered_from_its_copy(
        site, own_clamd):
    """The log names the virus and the copy.  With the name in local.ign2 clamd lets
    the copy pass."""
    clamd = own_clamd()
    site.start(ClamAddress=clamd.path, Quarantine="on")
    client = site.session()
    client.mail(body=EICAR_MAILS["plain"], want="250 2.0.0 Virus Detected")
    line, = site.daemon.wait_log("quarantined virus file as: ")
    copy = line.split(" as: ")[1]
    site.daemon.allowed.add(os.path.basename(copy))
    line, = site.daemon.wait_log("status=VIRUS:")
    name = line.split("status=VIRUS:")[1].replace(".UNOFFICIAL", "")
    clamd.kill()
    with open(os.path.join(clamd.settings["DatabaseDirectory"], "local.ign2"), "w") as file:
        file.write(name + "\n")
    clamd.start()
    with open(copy, "rb") as file:
        client.mail(body=file.read())
    client.quit()
    message, = site.hop.messages
    assert message.body == forwarded(EICAR_MAILS["plain"])


# ---------------------------------------------------------------- failures

@pytest.mark.covers("clamsmtpd.8 clamd is down")
@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_clamd_back_after_an_outage_scans(site, own_clamd, kind):
    """The first mail after clamd has started is scanned."""
    clamd = own_clamd()
    site.start(ClamAddress=clamd.path if kind == "unix" else clamd.tcp,
               Action="bounce")
    client = site.session()
    client.mail(body=CLEAN)
    for _ in range(2):
        clamd.kill()
        client.mail(body=CLEAN, want="451 4.3.0 Local Error")
        clamd.start()
        client.mail(body=EICAR_MAILS["base64"], want=REJECTED % EICAR_NAME)
        client.mail(body=CLEAN)
    client.quit()
    assert len(site.hop.messages) == 3
    assert len(site.daemon.log("status=CLAMAV-ERROR$")) == 2


def test_clamd_started_later_scans(site, own_clamd):
    """The daemon starts without clamd."""
    clamd = own_clamd()
    clamd.kill()
    os.unlink(clamd.path)
    site.start(ClamAddress=clamd.path)
    client = site.session()
    client.mail(body=CLEAN, want="451 4.3.0 Local Error")
    clamd.start()
    client.mail(body=CLEAN)
    client.quit()


def test_second_clamd_scans_while_the_first_is_dead(site, own_clamd, clamd):
    """The daemon uses the second clamd, over another kind of socket."""
    first = own_clamd()
    site.start(ClamAddress=[first.path, clamd.tcp], Action="bounce")
    client = site.session()
    client.mail(body=CLEAN)
    first.kill()
    client.mail(body=EICAR_MAILS["zipped"], want=REJECTED % EICAR_NAME)
    client.mail(body=CLEAN)
    client.quit()


# ---------------------------------------------------------------- limits

# 700 KiB.  The virus is in the first line of the text.
BIG = EICAR_MAILS["plain"] + b"x" * 76 + (b"\r\n" + b"x" * 76) * 9000 + b"\r\n"


@pytest.mark.covers("clamsmtpd.conf.5 MaxScanSize: StreamMaxLength")
@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_above_stream_max_length_is_552(site, own_clamd, kind):
    """A message above clamd's StreamMaxLength is refused, over either socket."""
    clamd = own_clamd(StreamMaxLength="100K")
    site.start(ClamAddress=clamd.path if kind == "unix" else clamd.tcp)
    client = site.session()
    client.mail(body=BIG, want="552 5.3.4 Message too big")
    client.mail(body=CLEAN)
    client.quit()
    assert len(site.hop.messages) == 1
    site.daemon.wait_log("status=OVERSIZE$")


def test_above_stream_max_length_with_scanfailure_pass_is_marked(site, own_clamd):
    """ScanFailure: pass forwards such a message, marked as not scanned."""
    clamd = own_clamd(StreamMaxLength="100K")
    site.start(ClamAddress=clamd.path, ScanFailure="pass")
    client = site.session()
    client.mail(body=BIG)
    client.quit()
    message, = site.hop.messages
    assert HEADER not in message.body, "it was not scanned"
    site.daemon.wait_log("status=UNSCANNED$")


@pytest.mark.covers("clamsmtpd.conf.5 MaxScanSize: MaxFileSize")
@pytest.mark.parametrize("where", ["ours", "clamd's"])
def test_above_max_file_size_is_552_where_a_limit_is_as_low(site, own_clamd, where):
    """clamd answers OK, without a scan, to a stream between its MaxFileSize and its
    StreamMaxLength.  Therefore MaxScanSize or StreamMaxLength must not be above
    MaxFileSize."""
    clamd = own_clamd(MaxFileSize="100K", StreamMaxLength="100K" if where != "ours" else "100M")
    site.start(ClamAddress=clamd.path, MaxScanSize="100K" if where == "ours" else "0")
    client = site.session()
    client.mail(body=BIG, want="552 5.3.4 Message too big")
    client.quit()
    assert site.hop.messages == []
    site.daemon.wait_log("status=OVERSIZE$")


@pytest.mark.covers("clamsmtpd.conf.5 MaxScanSize: MaxFileSize")
@pytest.mark.core
@pytest.mark.parametrize("chunks", [False, True], ids=["DATA", "BDAT"])
def test_maxscansize_leaves_no_message_that_clamd_does_not_scan(site, own_clamd, chunks):
    """With MaxScanSize as large as clamd's MaxFileSize, a virus in the last bytes
    is found or the message is refused, whatever its size."""
    limit = 100000
    clamd = own_clamd(MaxFileSize=str(limit))
    site.hop = site.new_hop(chunking=True)
    site.start(ClamAddress=clamd.path, MaxScanSize=str(limit), Action="bounce")
    client = site.session()
    end = b"\r\n" + EICAR + b"\r\n"
    for size in (limit + n for n in (-40, -29, -28, -27, -1, 0, 1)):
        body = real.HEADERS + b"\r\n"
        body += b"x" * (size - len(body) - len(end)) + end
        want = REJECTED % EICAR_NAME if size <= limit - 28 else "552 5.3.4"
        client.envelope()
        if chunks:
            client.chunk(body, last=True)
            client.expect(want)
        else:
            client.data(body, want)
    client.quit()
    assert site.hop.messages == []


@pytest.mark.covers("clamsmtpd.conf.5 Action: AlertExceedsMax")
def test_above_max_file_size_is_found_with_alert_exceeds_max(site, own_clamd):
    """With AlertExceedsMax clamd reports a message that it did not scan."""
    clamd = own_clamd(MaxFileSize="100K", StreamMaxLength="100M", AlertExceedsMax="yes")
    site.start(ClamAddress=clamd.path,
               Action=["bounce Heuristics.Limits.Exceeded.*", "drop"])
    client = site.session()
    client.mail(body=BIG, want=REJECTED % "Heuristics.Limits.Exceeded.MaxFileSize")
    client.quit()
    assert site.hop.messages == []


# ---------------------------------------------------------------- mail or not

DKIM = (b"DKIM-Signature: v=1; a=rsa-sha256; d=example.com; s=key;\r\n" +
        b"\tb=" + b"A" * 70 + b"\r\n" +
        (b"\t" + b"A" * 70 + b"\r\n") * 14)
TEXT = b"X-Text: " + b"x" * 60 + b"\r\n" + (b"\t" + b"x" * 70 + b"\r\n") * 15
BASE64 = b"Content-Transfer-Encoding: base64\r\n"
BINARY = b"Content-Type: application/octet-stream\r\n"
HIDDEN = {
    "long DKIM header first, no MIME-Version":
        DKIM + BINARY + BASE64 + b"\r\n" + real.encoded(EICAR),
    "MIME-Version far from Content-Type":
        DKIM + b"MIME-Version: 1.0\r\n" + TEXT + BINARY + BASE64 + b"\r\n" +
        real.encoded(EICAR),
    "an unknown header first":
        b"X-Unknown: yes\r\n" + BASE64 + b"\r\n" + real.encoded(EICAR),
}


@pytest.mark.covers("clamsmtpd.8 TRANSPARENCY: line for clamd")
@pytest.mark.parametrize("kind", HIDDEN)
def test_attachment_hidden_by_header_order_is_found(site, clamd, address, kind):
    """libclamav recognises mail by its first headers.  With these orders of headers
    it reads the mail as text and does not decode the attachment.  Our line before
    the mail prevents that.  This line is not forwarded."""
    mail = HIDDEN[kind]
    site.start(ClamAddress=address, Action="bounce")
    client = site.session()
    client.mail(body=mail, want=REJECTED % EICAR_NAME)
    harmless = mail.replace(real.encoded(EICAR), real.encoded(b"harmless"))
    client.mail(body=harmless)
    client.quit()
    message, = site.hop.messages
    harness.same(message.body, forwarded(harmless), "the mail")
    if "FOUND" in clamd.scan(mail):
        pytest.skip("passed, but this clamd needs no help of ours")


# ---------------------------------------------------------------- long

def talk(address, kind, big):
    """Run one session of some kind; return how many mails it has delivered."""
    client = Client(address)
    try:
        client.hello()
        if kind == 0:
            client.mail(body=EICAR_MAILS["zipped"], want=REJECTED % EICAR_NAME)
        elif kind == 1:
            client.mail(body=big)
        elif kind == 2:     # gone in the middle of a body
            client.begin(big[:100000])
            client.reset()
            return 0
        elif kind == 3:     # gone without QUIT
            client.envelope()
            return 0
        for _ in range(3):
            client.mail(body=CLEAN)
        client.quit()
        return 3 + (kind == 1)
    finally:
        client.close()


@pytest.mark.long
def test_minute_of_everything_loses_nothing(site, clamd):
    """All kinds of sessions run at once for a minute, and no resource grows."""
    def forget(hop_session, _):
        message = hop_session.messages[-1]
        message.wire = message.body = b""

    site.hop.on(".", forget)
    site.start(ClamAddress=[clamd.path, clamd.tcp], Action="bounce", level=3)
    big = real.attached(os.urandom(300000))

    def run(seconds):
        """Run the sessions; return how many mails were delivered."""
        end = time.monotonic() + seconds

        def work(number):
            sent = 0
            for turn in itertools.count(number):
                if time.monotonic() > end:
                    return sent
                sent += talk(site.daemon.address, turn % 5, big)
        sent = sum(harness.at_once(work, 8))
        site.daemon.settle()
        return sent

    sent = run(5)
    before = site.daemon.rss()
    sent += run(55)
    assert site.daemon.grown(before) <= 64, "KiB"
    assert len(site.hop.messages) == sent
