"""Mail servers for tests/interop/run.  Each is set up to pass every message for
example.com to the script SAVE, and to refuse recipients at refused.example.

In the texts of a server, @port@ is the port to listen on, at 127.0.0.1, and @dir@ is
the directory that contains its files and in which `start` runs.  All other settings
are those of the package.
"""

from collections import namedtuple

# The name, the Debian packages, commands that start the server, a command that
# prints the version, and files.
Server = namedtuple("Server", "name packages start version files")

SAVE = """#!/bin/sh
# usage: save SENDER RECIPIENT... <MESSAGE, or with these in the environment
[ $# -gt 0 ] || set -- "$SENDER" "$RECIPIENT"
file=$(mktemp @dir@/mail/XXXXXX.part) &&
{ printf '%s\\n' "$@" && echo && cat; } >"$file" && chmod 644 "$file" &&
mv "$file" "${file%.part}"
"""


def package(name):
    """Prints the version of an installed Debian package."""
    return "dpkg-query -W -f '${Version}\\n' " + name


def npm(name):
    return "npm install --no-audit --no-fund --silent %s@latest" % name


def npm_version(name):
    return "node -p 'require(\"./node_modules/%s/package.json\").version'" % name


def go(module):
    """Builds ./server from server.go."""
    return ("GOFLAGS=-mod=mod go mod init server && go get %s && go build -o server ."
            % module)


def go_version(module):
    return "go list -m -f '{{.Version}}' " + module


POSTFIX = """
compatibility_level = 3.6
maillog_file = @dir@/maillog
maillog_file_prefixes = @dir@
myhostname = mail.example.net
mydestination =
mynetworks =
smtpd_relay_restrictions = reject_unauth_destination
inet_interfaces = 127.0.0.1
virtual_mailbox_domains = example.com
virtual_mailbox_maps = static:any
virtual_transport = save
save_destination_recipient_limit = 50
smtpd_peername_lookup = no
disable_dns_lookups = yes
"""

EXIM = """
primary_hostname = mail.example.net
local_interfaces = 127.0.0.1
daemon_smtp_ports = @port@
host_lookup =
rfc1413_query_timeout = 0s
acl_smtp_rcpt = rcpt
acl_smtp_data = accept
tls_advertise_hosts =
begin acl
rcpt:
  accept domains = example.com
  deny message = relay not permitted
begin routers
save:
  driver = accept
  transport = save
begin transports
save:
  driver = pipe
  command = @dir@/save
  message_prefix =
  message_suffix =
  user = nobody
"""

OPENSMTPD = """
table users { "@example.com" = "nobody" }
listen on 127.0.0.1 port @port@
action "save" mda "@dir@/save '%{sender}' '%{rcpt}'" virtual <users>
match from any for domain "example.com" action "save"
"""

SENDMAIL = """
include(`/usr/share/sendmail/cf/m4/cf.m4')
OSTYPE(`linux')
FEATURE(`no_default_msa')
FEATURE(`accept_unresolvable_domains')
FEATURE(`nocanonify')
DAEMON_OPTIONS(`Port=@port@, Addr=127.0.0.1, Name=MTA')
define(`confTO_IDENT', `0')
define(`confDOMAIN_NAME', `mail.example.net')
MAILER(`local')
MAILER(`smtp')
MAILER_DEFINITIONS
Msave,	P=@dir@/save, F=lsnDFMu, S=EnvFromSMTP, R=EnvToSMTP, A=save $f $u
LOCAL_RULE_0
R$* < @ example.com . > $*	$#save $@ example.com $: $1 @example.com
LOCAL_RULESETS
SLocal_check_rcpt
R$* @ refused.example $*	$#error $@ 5.7.1 $: "550 Relaying denied"
"""

QPSMTPD = """
sub hook_queue {
    my ($self, $mail) = @_;
    open my $pipe, '|-', '@dir@/save', $mail->sender->address,
        map { $_->address } $mail->recipients or return DECLINED;
    print $pipe $mail->header->as_string;
    $mail->body_resetpos;
    while (defined(my $line = $mail->body_getline)) { print $pipe $line }
    close $pipe or return DECLINED;
    return OK, 'saved';
}
"""

AIOSMTPD = """
import subprocess

class Save:
    async def handle_RCPT(self, server, session, envelope, address, options):
        if address.endswith("@refused.example"):
            return "550 5.7.1 relaying denied"
        envelope.rcpt_tos.append(address)
        return "250 2.1.5 ok"

    async def handle_DATA(self, server, session, envelope):
        subprocess.run(["./save", envelope.mail_from, *envelope.rcpt_tos],
                       input=envelope.original_content, check=True)
        return "250 2.0.0 saved"

    @classmethod
    def from_cli(cls, parser, *args):
        return cls()
"""

SMTPD = """
import asyncore, smtpd, subprocess

class Save(smtpd.SMTPServer):
    def process_message(self, peer, sender, recipients, data, **_):
        subprocess.run(["./save", sender, *recipients], input=data, check=True)

Save(("127.0.0.1", @port@), None)
asyncore.loop()
"""

TWISTED = """
import subprocess
from twisted.internet import defer, protocol, reactor
from twisted.mail import smtp
from zope.interface import implementer

@implementer(smtp.IMessage)
class Message:
    def __init__(self, sender, recipient):
        self.command, self.lines = ["./save", sender, recipient], []

    def lineReceived(self, line):
        self.lines.append(line + b"\\n")

    def eomReceived(self):
        subprocess.run(self.command, input=b"".join(self.lines), check=True)
        return defer.succeed(None)

    def connectionLost(self):
        pass

@implementer(smtp.IMessageDelivery)
class Delivery:
    def receivedHeader(self, helo, origin, recipients):
        return b"Received: by twisted"

    def validateFrom(self, helo, origin):
        self.sender = str(origin)
        return origin

    def validateTo(self, user):
        if user.dest.domain == b"refused.example":
            raise smtp.SMTPBadRcpt(user)
        return lambda: Message(self.sender, str(user.dest))

class Factory(protocol.ServerFactory):
    def buildProtocol(self, address):
        esmtp = smtp.ESMTP()
        esmtp.factory, esmtp.delivery = self, Delivery()
        return esmtp

reactor.listenTCP(@port@, Factory(), interface="127.0.0.1")
reactor.run()
"""

NET_SERVER_MAIL = """
use IO::Socket::INET;
use Net::Server::Mail::ESMTP;
$SIG{CHLD} = 'IGNORE';
my $listener = IO::Socket::INET->new(
    Listen => 9, LocalAddr => '127.0.0.1', LocalPort => @port@, ReuseAddr => 1);
while (my $socket = $listener->accept) {
    next if fork;
    my $server = Net::Server::Mail::ESMTP->new(socket => $socket);
    $server->register("Net::Server::Mail::ESMTP::$_") for '8BITMIME', 'PIPELINING';
    $server->set_callback(RCPT => sub {
        $_[1] =~ /refused.example/ ? (0, 550, 'relaying denied') : 1;
    });
    $server->set_callback(DATA => sub {
        my ($session, $data) = @_;
        local $SIG{CHLD} = 'DEFAULT';
        open my $pipe, '|-', './save', $session->get_sender,
            $session->get_recipients or return 0;
        print $pipe $$data;
        close $pipe ? 1 : 0;
    });
    $server->process;
    exit;
}
"""

GO_SMTP = """package main

import (
	"io"
	"os/exec"
	"strings"

	"github.com/emersion/go-smtp"
)

type session struct {
	from string
	to   []string
}

func (s *session) Mail(from string, opts *smtp.MailOptions) error {
	s.from, s.to = from, nil
	return nil
}

func (s *session) Rcpt(to string, opts *smtp.RcptOptions) error {
	if strings.HasSuffix(to, "@refused.example") {
		return &smtp.SMTPError{Code: 550, Message: "relaying denied"}
	}
	s.to = append(s.to, to)
	return nil
}

func (s *session) Data(r io.Reader) error {
	save := exec.Command("./save", append([]string{s.from}, s.to...)...)
	stdin, err := save.StdinPipe()
	if err != nil {
		return err
	}
	if err := save.Start(); err != nil {
		return err
	}
	if _, err := io.Copy(stdin, r); err != nil {
		save.Process.Kill()
		return err
	}
	stdin.Close()
	return save.Wait()
}

func (s *session) Reset()                          {}
func (s *session) Logout() error                   { return nil }
func (s *session) AuthPlain(user, pw string) error { return nil }

type backend struct{}

func (backend) NewSession(*smtp.Conn) (smtp.Session, error) {
	return &session{}, nil
}

func main() {
	s := smtp.NewServer(backend{})
	s.Addr = "127.0.0.1:@port@"
	s.Domain = "mail.example.net"
	panic(s.ListenAndServe())
}
"""

SMTP_SERVER = """
const { SMTPServer } = require("smtp-server");
const { spawn } = require("child_process");

new SMTPServer({
    authOptional: true,
    hideSTARTTLS: true,
    onRcptTo(address, session, callback) {
        callback(/@refused.example$/.test(address.address) &&
            Object.assign(new Error("relaying denied"), { responseCode: 550 }));
    },
    onData(stream, { envelope }, callback) {
        const save = spawn("./save", [envelope.mailFrom.address,
            ...envelope.rcptTo.map(to => to.address)]);
        stream.pipe(save.stdin);
        save.on("close", code => callback(code && new Error("not saved")));
    },
}).on("error", console.error).listen(@port@, "127.0.0.1");
"""

HARAKA = """
const { spawn } = require("child_process");

exports.hook_rcpt = (next, connection, [to]) =>
    to.host === "refused.example" ? next(DENY, "relaying denied") : next(OK);

exports.hook_queue = function (next, connection) {
    const mail = connection.transaction;
    const save = spawn("@dir@/save", [mail.mail_from, ...mail.rcpt_to].map(
        address => address.user + "@" + address.host));
    mail.message_stream.pipe(save.stdin);
    save.on("close", code => next(code ? DENYSOFT : OK));
};
"""

SERVERS = [
    Server("Postfix", "postfix", """
        cp postfix.cf /etc/postfix/main.cf
        sed -E 's/^smtp( +inet.*)/127.0.0.1:@port@ \\1/
            s/^(\\S+ +\\S+ +\\S+ +\\S+ +)y/\\1n/' \\
            /usr/share/postfix/master.cf.dist >/etc/postfix/master.cf
        cat >>/etc/postfix/master.cf <<-EOF
		save unix - n n - - pipe user=nobody argv=@dir@/save
		  \\${sender} \\${recipient}
		postlog unix-dgram n - n - 1 postlogd
		EOF
        postfix start""",
           package("postfix"), {"postfix.cf": POSTFIX}),
    Server("Exim", "exim4-daemon-light", """
        cp exim.conf /etc/exim4/exim4.conf
        exim4 -bdf &
        tail -F /var/log/exim4/mainlog /var/log/exim4/paniclog &""",
           package("exim4-daemon-light"), {"exim.conf": EXIM}),
    # OpenSMTPD 7.6 does not start without root certificates.
    Server("OpenSMTPD", "opensmtpd ca-certificates", """
        mkdir -p /var/spool/smtpd
        chmod 711 /var/spool/smtpd
        cp smtpd.conf /etc
        smtpd -d &""",
           package("opensmtpd"), {"smtpd.conf": OPENSMTPD}),
    Server("sendmail", "sendmail-bin sendmail-cf m4", """
        # sendmail waits for a minute if the host has no full name.
        sed -i "1i 127.0.0.1 mail.example.net $(hostname)" /etc/hosts
        m4 sendmail.mc >/etc/mail/sendmail.cf
        mkdir -p /var/spool/mqueue
        chmod 700 /var/spool/mqueue
        chown root:root /var/spool/mqueue
        sendmail-mta -bD &""",
           package("sendmail-bin"), {"sendmail.mc": SENDMAIL}),
    Server("Courier", "courier-mta courier-authdaemon", """
        cd /etc/courier
        echo mail.example.net >me
        echo example.com >locals
        echo example.com >esmtpacceptmailfor
        echo '| @dir@/save' >aliasdir/.courier-default
        sed -i 's/^BOFHCHECKDNS=.*/BOFHCHECKDNS=0/' esmtpd
        printf '127.0.0.1\\tallow\\n' >smtpaccess/default
        makesmtpaccess; makeacceptmailfor; makealiases
        mkdir -p /run/courier/authdaemon
        chown -R courier /run/courier
        authdaemond start
        courier start
        set -a; . ./esmtpd
        /usr/sbin/couriertcpd -noidentlookup -nodnslookup -user=courier -group=courier \\
            -address=127.0.0.1 -access=/etc/courier/smtpaccess.dat \\
            -maxperip=50 -maxperc=50 @port@ /usr/sbin/courieresmtpd &
        cd @dir@""",
           package("courier-mta"), {}),
    Server("qpsmtpd", "qpsmtpd", """
        echo example.com >/etc/qpsmtpd/rcpthosts
        echo @dir@ >>/etc/qpsmtpd/plugin_dirs
        printf '%s\\n' rcpt_ok save_mail >/etc/qpsmtpd/plugins
        export QPSMTPD_CONFIG=/etc/qpsmtpd
        qpsmtpd-forkserver -l 127.0.0.1 -p @port@ -u qpsmtpd -m 50 &""",
           package("qpsmtpd"), {"save_mail": QPSMTPD}),
    Server("chasquid", "chasquid", """
        mkdir -p conf/domains/example.com conf/certs/mail.example.net
        cat >conf/chasquid.conf <<-EOF
		hostname: "mail.example.net"
		smtp_address: "127.0.0.1:@port@"
		data_dir: "@dir@/data"
		suffix_separators: "."
		drop_characters: "-"
		mail_log_path: "<stdout>"
		mail_delivery_agent_bin: "@dir@/save"
		mail_delivery_agent_args: "%from%"
		mail_delivery_agent_args: "%to%"
		EOF
        cd conf/certs/mail.example.net
        openssl req -x509 -newkey rsa:2048 -nodes -days 9 -subj /CN=mail \\
            -keyout privkey.pem -out fullchain.pem
        cd @dir@
        for user in a b c victim; do
            chasquid-util -C=conf user-add $user@example.com --password=secret
        done
        chasquid -config_dir=conf &""",
           package("chasquid"), {}),
    Server("aiosmtpd", "python3-aiosmtpd", """
        PYTHONPATH=. /usr/bin/python3 -m aiosmtpd -n -l 127.0.0.1:@port@ \\
            -c server.Save &""",
           package("python3-aiosmtpd"), {"server.py": AIOSMTPD}),
    Server("Python smtpd", "python3", "/usr/bin/python3 server.py &",
           package("python3"), {"server.py": SMTPD}),
    Server("Twisted", "python3-twisted", "/usr/bin/python3 server.py &",
           package("python3-twisted"), {"server.py": TWISTED}),
    Server("Net::Server::Mail", "libnet-server-mail-perl", "perl server.pl &",
           package("libnet-server-mail-perl"), {"server.pl": NET_SERVER_MAIL}),
    Server("go-smtp", "ca-certificates",
           go("github.com/emersion/go-smtp@latest") + "\n./server &",
           go_version("github.com/emersion/go-smtp"), {"server.go": GO_SMTP}),
    Server("go-smtp 0.16", "ca-certificates",
           go("github.com/emersion/go-smtp@v0.16.0") + "\n./server &",
           go_version("github.com/emersion/go-smtp"),
           {"server.go": GO_SMTP.replace(", opts *smtp.RcptOptions", "")}),
    Server("smtp-server", "ca-certificates",
           npm("smtp-server") + "\nnode server.js &",
           npm_version("smtp-server"), {"server.js": SMTP_SERVER}),
    Server("Haraka", "ca-certificates",
           npm("Haraka") + """
        node_modules/.bin/haraka -i conf
        printf 'listen=127.0.0.1:@port@\\nnodes=0\\n' >conf/config/smtp.ini
        echo save >conf/config/plugins
        cp save.js conf/plugins
        node_modules/.bin/haraka -c conf &""",
           npm_version("Haraka"), {"save.js": HARAKA}),
]
