"""Mail clients for tests/interop/run.

A client is a script.  It sends the file $MAIL, whose lines end in LF, from $FROM to
the addresses in $TO, which blanks separate, through the server on 127.0.0.1, port
$PORT.  A client that writes the header itself sends $BODY instead.  The exit status
is that of the client.  All scripts run in one directory, with FILES.
"""

from collections import namedtuple

from servers import go_version, npm, npm_version, package

# The name, the Debian packages, a command that prints the version, the script, and
# commands that prepare it.
Client = namedtuple("Client", "name packages version script setup",
                    defaults=["true"])


def shell(text):
    return "#!/bin/sh\n" + text


def python(text):
    return """#!/usr/bin/python3
import os
port, sender = int(os.environ["PORT"]), os.environ["FROM"]
to = os.environ["TO"].split()
with open(os.environ["MAIL"], "rb") as file:
    mail = file.read().replace(b"\\n", b"\\r\\n")
""" + text


def perl(text):
    return """#!/usr/bin/perl
use strict;
my ($port, $from, @to) = ($ENV{PORT}, $ENV{FROM}, split ' ', $ENV{TO});
open my $file, '<', $ENV{MAIL} or die;
my $mail = do { local $/; <$file> };
""" + text


def go(imports, text):
    return """package main

import (
	"log"
	"os"
	"strings"

	%s
)

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}

func main() {
	server, from := "127.0.0.1:"+os.Getenv("PORT"), os.Getenv("FROM")
	to := strings.Fields(os.Getenv("TO"))
	mail, err := os.Open(os.Getenv("MAIL"))
	check(err)
%s}
""" % (imports, text)


def unpacked(name):
    """Unpacks a Debian package that conflicts with others."""
    return """
    mkdir %s.d && cd %s.d && apt-get -q download %s && dpkg -x *.deb . &&
    rm -rf lib && cp -a --remove-destination */ / && cd ..
    """ % (name, name, name)


def package_file(name):
    """Prints its version."""
    return "dpkg-deb -f %s.d/*.deb Version" % name


MUTT = """
set realname="A" from="a@example.com" use_from=yes envelope_from_address="$FROM"
set use_envelope_from=yes smtp_url="smtp://127.0.0.1:$PORT/" ssl_starttls=no
set ssl_force_tls=no
set copy=no sendmail="" crypt_autosign=no
"""

NULLMAILER = """
export HELOHOST=client.example
{ echo host=127.0.0.1; echo port=$PORT; echo; } >nullmailer.conf
{ echo "$FROM"; printf '%s\\n' $TO; echo; cat "$MAIL"; } >nullmailer.mail
/usr/lib/nullmailer/smtp <nullmailer.conf 3<nullmailer.mail
"""

GO = go('"io"\n\t"net/smtp"', """
	text, err := io.ReadAll(mail)
	check(err)
	check(smtp.SendMail(server, nil, from, to, text))
""")

GO_SMTP = go('"github.com/emersion/go-smtp"', """
	client, err := smtp.Dial(server)
	check(err)
	check(client.SendMail(from, to, mail))
	client.Quit()
""")

JAVA = """
import java.io.FileInputStream;
import java.util.Properties;
import javax.mail.*;
import javax.mail.internet.*;

public class Send {
    public static void main(String[] args) throws Exception {
        Properties settings = new Properties();
        settings.put("mail.smtp.port", System.getenv("PORT"));
        settings.put("mail.smtp.from", System.getenv("FROM"));
        Session session = Session.getInstance(settings);
        Message mail = new MimeMessage(session,
            new FileInputStream(System.getenv("MAIL")));
        Transport transport = session.getTransport("smtp");
        transport.connect("127.0.0.1", null, null);
        transport.sendMessage(mail, InternetAddress.parse(
            System.getenv("TO").replace(' ', ',')));
        transport.close();
    }
}
"""

# Sends each message at once to a smarthost.
EXIM = """
primary_hostname = client.example
begin routers
smarthost:
  driver = manualroute
  route_list = * 127.0.0.1
  self = send
  transport = smtp
begin transports
smtp:
  driver = smtp
  port = ${env{PORT}}
  allow_localhost
"""

CLIENTS = [
    Client("swaks", "swaks", package("swaks"), shell("""
        swaks --server 127.0.0.1 --port $PORT --from "$FROM" \\
            --to "$(echo $TO | tr ' ' ,)" --data @"$MAIL" --suppress-data
        """)),
    Client("curl", "curl", package("curl"), shell("""
        curl -sS smtp://127.0.0.1:$PORT/client.example --crlf --mail-from "$FROM" \\
            $(printf -- ' --mail-rcpt %s' $TO) -T "$MAIL"
        """)),
    Client("msmtp", "msmtp", package("msmtp"), shell("""
        msmtp --file=/dev/null --host=127.0.0.1 --port=$PORT --tls=off --auth=off \\
            --from="$FROM" -- $TO <"$MAIL"
        """)),
    Client("nullmailer", "ca-certificates", package_file("nullmailer"),
           shell(NULLMAILER), unpacked("nullmailer")),
    Client("dma", "ca-certificates", package_file("dma"), shell("""
        printf '%s\\n' "SMARTHOST 127.0.0.1" "PORT $PORT" \\
            "SPOOLDIR /var/spool/dma" >/etc/dma/dma.conf
        /usr/sbin/dma -D -f "$FROM" $TO <"$MAIL"
        """), unpacked("dma")),
    Client("ssmtp", "ca-certificates", package_file("ssmtp"), shell("""
        printf '%s\\n' "mailhub=127.0.0.1:$PORT" FromLineOverride=YES >ssmtp.conf
        /usr/sbin/ssmtp -C ssmtp.conf -f"$FROM" $TO <"$MAIL"
        """), unpacked("ssmtp")),
    Client("esmtp", "esmtp", package("esmtp"), shell("""
        echo "hostname = 127.0.0.1:$PORT" >esmtprc
        esmtp -C esmtprc -f "$FROM" $TO <"$MAIL"
        """)),
    Client("mailutils", "mailutils", package("mailutils"), shell("""
        mail --exec "set sendmail=smtp://127.0.0.1:$PORT;notls" \\
            --return-address="$FROM" --subject=hello $TO <"$BODY"
        """)),
    Client("s-nail", "s-nail", package("s-nail"), shell("""
        s-nail -:/ -Sv15-compat -Smta=smtp://127.0.0.1:$PORT -Ssmtp-auth=none \\
            -Ssendwait -Sfrom="$FROM" -r "$FROM" -s hello $TO <"$BODY"
        """)),
    Client("mutt", "mutt", package("mutt"), shell("""
cat >muttrc <<EOF%sEOF
mutt -n -F muttrc -s hello -- $TO <"$BODY"
""" % MUTT)),
    Client("git send-email", "git-email libmailtools-perl", package("git-email"), shell("""
        HOME=$PWD git send-email --smtp-server=127.0.0.1 --smtp-server-port=$PORT \\
            --envelope-sender="$FROM" --from="$FROM" --confirm=never --quiet \\
            --suppress-cc=all --no-validate --transfer-encoding=8bit \\
            $(printf -- ' --to=%s' $TO) "$MAIL"
        """)),
    Client("sendEmail", "sendemail", package("sendemail"), shell("""
        sendemail -q -s 127.0.0.1:$PORT -o tls=no -f "$FROM" -t $TO -u hello \\
            -o message-file="$BODY"
        """)),
    Client("Python smtplib", "python3", package("python3"), python("""
import smtplib
with smtplib.SMTP("127.0.0.1", port) as smtp:
    refused = smtp.sendmail(sender, to, mail, ["BODY=8BITMIME"])
raise SystemExit(len(refused))
""")),
    Client("aiosmtplib", "python3-aiosmtplib", package("python3-aiosmtplib"), python("""
import asyncio, aiosmtplib
refused, _ = asyncio.run(aiosmtplib.send(
    mail, sender=sender, recipients=to, hostname="127.0.0.1", port=port))
raise SystemExit(len(refused))
""")),
    Client("Net::SMTP (Perl)", "perl", package("perl"), perl("""
use Net::SMTP;
my $smtp = Net::SMTP->new('127.0.0.1', Port => $port, Hello => 'client.example') or die;
$smtp->mail($from) or die;
my @good = $smtp->recipient(@to, { SkipBad => 1 });
$smtp->data($mail) or die $smtp->message;
$smtp->quit;
exit(@to - @good);
""")),
    Client("Email::Sender", "libemail-sender-perl libemail-simple-perl",
           package("libemail-sender-perl"), perl("""
use Email::Sender::Simple 'sendmail';
use Email::Sender::Transport::SMTP;
sendmail($mail, { from => $from, to => \\@to,
    transport => Email::Sender::Transport::SMTP->new(
        host => '127.0.0.1', port => $port) });
""")),
    Client("Net::SMTP (Ruby)", "ruby", package("ruby"), """#!/usr/bin/ruby
require 'net/smtp'
Net::SMTP.start('127.0.0.1', ENV['PORT'].to_i) do |smtp|
  smtp.send_message File.binread(ENV['MAIL']), ENV['FROM'], *ENV['TO'].split
end
"""),
    Client("PHP Net_SMTP", "php-cli php-net-smtp", package("php-net-smtp"),
           """#!/usr/bin/php
<?php
require 'Net/SMTP.php';
$smtp = new Net_SMTP('127.0.0.1', getenv('PORT'), 'client.example');
function check($result) {
    if (PEAR::isError($result)) { fwrite(STDERR, $result->getMessage()); exit(1); }
}
check($smtp->connect());
check($smtp->mailFrom(getenv('FROM')));
foreach (explode(' ', getenv('TO')) as $to) check($smtp->rcptTo($to));
check($smtp->data(file_get_contents(getenv('MAIL'))));
$smtp->disconnect();
"""),
    Client("Tcl smtp", "tcllib tcl", package("tcllib"), """#!/usr/bin/tclsh
package require smtp
set file [open $env(BODY) rb]
set mail [mime::initialize -canonical text/plain -encoding 8bit -string [read $file]]
set bad [smtp::sendmessage $mail -servers 127.0.0.1 -ports $env(PORT) -usetls 0 \\
    -originator $env(FROM) -recipients [join $env(TO) ,] -atleastone 1 \\
    -header {Subject hello}]
exit [llength $bad]
"""),
    Client("LuaSocket", "lua5.1 lua-socket", package("lua-socket"), """#!/usr/bin/lua5.1
local smtp, ltn12 = require("socket.smtp"), require("ltn12")
local to = {}
for address in os.getenv("TO"):gmatch("%S+") do to[#to + 1] = "<" .. address .. ">" end
local source = ltn12.source.chain(ltn12.source.file(io.open(os.getenv("MAIL"), "rb")),
    require("mime").normalize())
local ok, why = smtp.send {
    server = "127.0.0.1", port = os.getenv("PORT"), rcpt = to,
    from = "<" .. os.getenv("FROM") .. ">", source = source }
if not ok then io.stderr:write(why, "\\n") os.exit(1) end
"""),
    Client("JavaMail", "libmail-java", package("libmail-java"), shell("""
        java -cp /usr/share/java/javax.mail.jar:. Send
        """), "javac -cp /usr/share/java/javax.mail.jar Send.java"),
    Client("nodemailer", "ca-certificates", npm_version("nodemailer"),
           """#!/usr/bin/env node
const { FROM, TO, PORT, MAIL } = process.env;
require(process.cwd() + "/node_modules/nodemailer").createTransport({
    host: "127.0.0.1", port: PORT, ignoreTLS: true
}).sendMail({
    envelope: { from: FROM, to: TO.split(" ") }, raw: { path: MAIL }
}).then(sent => process.exit(sent.rejected.length), why => {
    console.error(why.message); process.exit(99); });
""", npm("nodemailer")),
    Client("Go net/smtp", "ca-certificates", "go env GOVERSION",
           shell("./go-net-smtp"), "go build -o go-net-smtp net-smtp.go"),
    Client("go-smtp", "ca-certificates",
           "cd go-smtp && " + go_version("github.com/emersion/go-smtp"),
           shell("go-smtp/client"), """
           mkdir go-smtp && cp go-smtp.go go-smtp/main.go && cd go-smtp &&
           go mod init client && go get github.com/emersion/go-smtp@latest &&
           go build -o client . && cd .."""),
    Client("Exim", "exim4-daemon-light", package("exim4-daemon-light"), shell("""
        sed "s/.{env{PORT}}/$PORT/" exim.conf >/etc/exim4/exim4.conf
        exim4 -odf -oee -f "$FROM" $TO <"$MAIL"
        status=$?
        left=$(exim4 -bpc)
        exim4 -bpr | awk '/</{ print $3 }' | xargs -r exim4 -Mrm
        [ "$status$left" = 00 ]
        """)),
]

FILES = {"net-smtp.go": GO, "go-smtp.go": GO_SMTP, "Send.java": JAVA,
         "exim.conf": EXIM}
