#!/bin/sh
# Runs as root in the machine of run.sh, in a directory with the package.
# Prints a line per check; the last line counts them.

results=$PWD/results
examples=/usr/share/doc/clamsmtp/docs/examples
exe=/usr/share/clamav-testfiles/clam.exe
conf=/etc/clamsmtpd.conf
drop_in=/etc/systemd/system/clamsmtp.service.d/test.conf
passed=0 failed=0

# check NAME COMMAND...
check()
{
	name=$1
	shift
	if "$@" >"$results/last" 2>&1; then
		passed=$((passed + 1))
		echo "passed: $name"
	else
		failed=$((failed + 1))
		echo "FAILED: $name"
		cat "$results/last"
	fi
}

# soon NAME SECONDS COMMAND...
soon()
{
	name=$1 times=$(($2 * 2))
	shift 2
	while [ $times -gt 0 ] && ! "$@" >/dev/null 2>&1; do
		times=$((times - 1))
		sleep .5
	done
	check "$name" "$@"
}

# equal WANT COMMAND...
equal()
{
	want=$1
	shift
	got=$("$@" 2>&1)
	[ "$got" = "$want" ] || {
		echo "want '$want', got '$got'"
		return 1
	}
}

not()
{
	! "$@"
}

active()
{
	systemctl is-active -q clamsmtp
}

pid()
{
	systemctl show -p MainPID --value clamsmtp
}

stored()
{
	systemctl show -p NFileDescriptorStore --value clamsmtp
}

listens()
{
	ss -tln | grep -q ":$1 "
}

greets()
{
	sleep 5 | nc -q 5 "$@" | grep -q '^220 smtp.passthru'
}

mail()
{
	swaks --server 127.0.0.1 --to you@vm.example "$@"
}

aa_of()
{
	tr -d '\0' <"/proc/$(pidof "$1")/attr/current"
}

# with_unit [DROP_IN [CONFIGURATION]]: restarts with these files, or the usual ones
with_unit()
{
	rm -f "$drop_in"
	[ $# = 0 ] || cat "$1" >"$drop_in"
	cat "${2-/etc/clamsmtpd.test}" >$conf
	systemctl daemon-reload
	systemctl restart clamsmtp
}

# The journal has a line like this since the last start.
journal()
{
	journalctl -q -o cat "_PID=$(pid)" | grep -q "$1"
}

# Debian 13 installs it disabled.
systemctl enable -q --now clamav-daemon.socket clamav-daemon.service
soon "clamd answers" 300 \
    sh -c 'printf "zPING\0" | nc -U -q 5 /run/clamav/clamd.ctl | grep -qa PONG'
check "AppArmor confines clamd" equal "/usr/sbin/clamd (enforce)" \
    aa_of clamd
useradd -m you
postconf -e 'mydestination=vm.example, vm, localhost' myhostname=vm.example \
    inet_interfaces=loopback-only compatibility_level=3.6
systemctl restart postfix
soon "Postfix listens" 120 listens 25

# ------------------------------------------------------------ installation

check "the package is installed" dpkg -i clamsmtp_*.deb
check "the service runs" active
check "it is enabled" systemctl is-enabled clamsmtp
check "it listens on the package's port" listens 10026
check "the listener is stored" equal 1 stored
check "the daemon has no capability" grep -q '^CapPrm:	0*$' "/proc/$(pid)/status"
check "a filter of system calls is on" grep -q '^Seccomp:	2' "/proc/$(pid)/status"

# ------------------------------------------- docs/postfix.md, after the queue

for file in main master; do
	cat "$examples/postfix-after-queue/$file.cf" >>/etc/postfix/$file.cf
done
cp "$examples/postfix-after-queue/clamsmtpd.conf" /etc/clamsmtpd.test
mkdir -p "${drop_in%/*}"
check "the configuration of the recipe starts" with_unit
check "postfix check" postfix check
postfix reload
check "only the new port is stored" equal 1 stored
mail --h-Subject clean >/dev/null
mail --h-Subject sick --attach "@$exe" >/dev/null
soon "a clean mail arrives" 120 grep -q '^Subject: clean' /var/mail/you
soon "an infected mail is dropped" 120 \
    grep -q '250 2.0.0 Virus Detected; Discarded Email' /var/log/mail.log
check "it did not arrive" not grep -q '^Subject: sick' /var/mail/you
check "it is in the quarantine" sh -c 'ls /var/spool/clamsmtp/virus.*'

# --------------------------------------------------- restarts under traffic

mails=240
before=$(wc -l </var/log/mail.log)
: >/var/mail/you

log()
{
	tail -n "+$((before + 1))" /var/log/mail.log
}

# reached NUMBER: so many mails are delivered
reached()
{
	[ "$(log | grep -c 'relay=local.*status=sent')" -ge "$1" ]
}

deferred()
{
	log | grep -c 'status=deferred'
}

# Each mail was delivered or deferred.
tried()
{
	reached $((mails - $(deferred)))
}

queue_empty()
{
	postqueue -p | grep -q 'queue is empty'
}

# Postfix says this of a mail whose final reply it did not get.
unsure='may be sent more than once'

# Prints the Message-Ids that arrived twice, but whose reply was not lost.
unexplained()
{
	sed -n "s/.*: \([0-9A-Za-z]*\): .*$unsure.*/\1/p" "$results/restart.log" |
	    while read -r queue_id; do
		sed -n "s/.*: $queue_id: message-id=//p" "$results/restart.log"
	done >"$results/lost"
	sort "$results/ids" | uniq -d | grep -vxFf "$results/lost"
}

smtp-source -4 -s 6 -m $mails -l 3000 -f sender@vm.example -t you@vm.example \
    127.0.0.1:25 &
for number in 25 70 115; do
	soon "$number mails are delivered" 600 reached $number
	check "restart" systemctl restart clamsmtp
done
soon "160 mails are delivered" 600 reached 160
check "no restart lost a reply" not grep "$unsure" /var/log/mail.log
kill -KILL "$(pid)"
wait
soon "each mail was tried" 600 tried
echo "deferred: $(deferred)"
log | sed -n 's/.*status=deferred/    /p' | sort | uniq -c
postqueue -f
soon "the queue empties" 600 queue_empty
log >"$results/restart.log"
sed -n 's/^Message-Id: *//Ip' /var/mail/you >"$results/ids"
check "no connection was refused" not grep 'Connection refused' "$results/restart.log"
check "delivery was not suspended" not \
    grep 'temporarily suspended' "$results/restart.log"
check "all $mails are delivered" equal $mails sh -c "sort -u '$results/ids' | wc -l"
check "twice only if SIGKILL lost the reply" equal "" unexplained
check "all of them scanned" equal "$(wc -l <"$results/ids")" \
    grep -c '^X-Virus-Scanned:' /var/mail/you

# ------------------------------------------------------- reload, stop, sockets

main=$(pid)
sed -i 's/^Listen:.*/&\nListen: 127.0.0.1:10035/' $conf
check "reload" systemctl reload clamsmtp
soon "a reload opens a port" 30 listens 10035
soon "and stores it" 10 equal 2 stored
echo 'Nonsense: 1' >>$conf
check "a reload with an error fails" not systemctl reload clamsmtp
check "the daemon goes on" equal "$main" pid
check "the journal says why" sh -c 'journalctl -u clamsmtp | grep "Nonsense.*not the name"'
sed -i '/Nonsense/d; s/^Listen: .*:10035/Listen: \/run\/clamsmtp\/in.sock/' $conf
check "start with a unix socket" systemctl restart clamsmtp
check "a port without a line is closed" not listens 10035
inode=$(stat -c %i /run/clamsmtp/in.sock)
systemctl restart clamsmtp
check "the unix socket stays over a restart" equal "$inode" stat -c %i /run/clamsmtp/in.sock
check "and serves" greets -U /run/clamsmtp/in.sock
systemctl stop clamsmtp
check "stop closes the port" not listens 10025
check "stop removes the directory" not ls -d /run/clamsmtp

printf '[Socket]\nListenStream=127.0.0.1:10025\n' >/etc/systemd/system/clamsmtp.socket
with_unit
systemctl stop clamsmtp
systemctl start clamsmtp.socket
check "a client starts the service of a socket unit" greets 127.0.0.1 10025
check "its socket is not stored" equal 0 stored
systemctl stop clamsmtp.socket clamsmtp
rm /etc/systemd/system/clamsmtp.socket

printf '[Service]\nWatchdogSec=8\n' >"$results/drop-in"
with_unit "$results/drop-in"
main=$(pid)
sleep 20
check "the watchdog is fed" equal "$main" pid
kill -STOP "$main"
soon "the watchdog ends a halted daemon" 60 \
    sh -c 'journalctl -u clamsmtp | grep "Watchdog timeout"'
check "and the next one serves" greets 127.0.0.1 10025

# ----------------------------------------------------------------- drop-ins

printf 'VirusAction: /usr/local/bin/report\n' | cat /etc/clamsmtpd.test - >"$results/conf"
cat >/usr/local/bin/report <<'E'
#!/bin/sh
printf 'Subject: virus\n\n%s %s\n' "$VIRUS" "$EMAIL" | /usr/sbin/sendmail -f '<>' you@vm.example
E
chmod 755 /usr/local/bin/report
check "virusaction.conf" with_unit /usr/share/doc/clamsmtp/examples/virusaction.conf "$results/conf"
mail --attach "@$exe" >/dev/null
soon "sendmail in a VirusAction" 120 grep -q '^Subject: virus' /var/mail/you

printf '[Service]\nPrivateUsers=no\nCapabilityBoundingSet=CAP_NET_BIND_SERVICE\nAmbientCapabilities=CAP_NET_BIND_SERVICE\nSystemCallFilter=capset\n' >"$results/drop-in"
printf 'Listen: 127.0.0.2:587\n' | cat /etc/clamsmtpd.test - >"$results/conf"
check "a port below 1024" with_unit "$results/drop-in" "$results/conf"
check "is open" listens 587
check "and the capability given up" grep -q '^CapPrm:	0*$' "/proc/$(pid)/status"

for name in lan wan; do
	ip netns add $name
	ip link add ${name}0 type veth peer name gw
	ip link set gw netns $name
	ip link set ${name}0 up
	ip -n $name link set gw up
done
ip addr add 10.9.1.1/24 dev lan0
ip addr add 10.9.2.1/24 dev wan0
ip -n lan addr add 10.9.1.2/24 dev gw
ip -n wan addr add 10.9.2.2/24 dev gw
ip -n lan route add default via 10.9.1.1
ip -n wan route add default via 10.9.2.1
sysctl -qw net.ipv4.ip_forward=1
ip netns exec wan smtp-sink -u postfix 10.9.2.2:25 10 &
sink=$!
tproxy=$examples/transparent
with_unit /dev/null "$tproxy/clamsmtpd.conf"
check "TPROXY without the drop-in: a warning" journal IP_TRANSPARENT
check "tproxy.conf" with_unit "$tproxy/tproxy.conf" "$tproxy/clamsmtpd.conf"
check "no warning" not journal IP_TRANSPARENT
check "tproxy.nft" nft -f "$tproxy/tproxy.nft"
check "tproxy-routes" sh "$tproxy/tproxy-routes" add

through()
{
	ip netns exec lan swaks --timeout 60 --server 10.9.2.2 \
	    --from a@b.example --to you@c.example "$@" >"$results/through"
	grep -q '220 smtp.passthru' "$results/through" &&
	    grep -q "$want" "$results/through"
}
want='250 2.0.0 Ok'
check "a clean mail through TPROXY" through
want='550 5.7.1 Virus Detected'
check "an infected one" through --attach "@$exe"
systemctl restart clamsmtp
want='250 2.0.0 Ok'
check "after a restart, with the stored sockets" through
nft delete table inet clamsmtpd
sh "$tproxy/tproxy-routes" del
kill $sink
with_unit

# --------------------------------------------------------------------- logs

systemd-analyze --no-pager security clamsmtp | tail -n 1
journalctl -u clamsmtp | grep ' clamsmtpd\[' >"$results/journal.log"
grep clamsmtpd /var/log/mail.log >"$results/mail.log"
check "no line has two tags" not grep 'clamsmtpd.*: clamsmtpd:' "$results/journal.log"
for file in journal mail; do
	echo "unknown to logcheck, of $(wc -l <"$results/$file.log") lines of $file:"
	grep -vE -f /etc/logcheck/ignore.d.server/clamsmtp "$results/$file.log" |
	    sed 's/.* clamsmtpd[^:]*:/   /' | sort | uniq -c
done
check "logcheck knows a usual mail" grep -cE -f \
    /etc/logcheck/ignore.d.server/clamsmtp "$results/journal.log"

# ------------------------------------------------------------------ removal

main=$(pid)
check "the package again" dpkg -i clamsmtp_*.deb
check "it was restarted" not equal "$main" pid
check "its listener is stored" equal 1 stored
rm -r "${drop_in%/*}"
check "removal" dpkg -r clamsmtp
check "no daemon is left" not pgrep clamsmtpd
check "no port is open" not listens 10025
check "purge" dpkg -P clamsmtp
check "no file is left" not sh -c 'ls -d /etc/clamsmtpd.conf /var/spool/clamsmtp /run/clamsmtp'
check "no unit failed" equal 0 sh -c 'systemctl list-units --failed -q | wc -l'
journalctl -b >"$results/all.log"
echo "$passed passed, $failed failed"
