#!/bin/sh
# usage: ./demo.sh [--keep] [--system-clamd]
#
# Shows clamsmtpd at work: installs what is missing, builds, starts a virus
# scanner, a receiving mail server and clamsmtpd between them, sends three mails,
# and shows what happened to each.  All processes and files are private to this
# script and gone when it ends.
#
#   --keep          leave everything running, and say how to send mail to it
#   --system-clamd  use this machine's running clamd, not one of our own

set -u
cd "$(dirname "$0")" || exit 1
# shellcheck source=tests/install.sh
. tests/install.sh

keep='' system=''
for arg do
	case $arg in
	--keep)		keep=yes ;;
	--system-clamd)	system=yes ;;
	-h | --help)	usage 0 ;;
	*)	usage 2 ;;
	esac
done

dir=$(scratch demo) || exit 1
pids=

clean()
{
	for pid in $pids; do
		kill "$pid" 2>/dev/null
	done
	# shellcheck disable=SC2086
	wait $pids 2>/dev/null
	rm -rf "$dir"
}
trap clean EXIT
trap 'exit 1' HUP INT TERM

fail()
{
	echo "$*" >&2
	for f in "$dir"/*.log; do
		[ ! -s "$f" ] || tail -n 5 "$f" >&2
	done
	exit 1
}

# wait_for WHAT PID COMMAND...: waits until the command succeeds, for a minute at
# most, and only while the process lives
wait_for()
{
	what=$1 process=$2 turn=0
	shift 2
	until "$@" 2>/dev/null; do
		kill -0 "$process" 2>/dev/null ||
		    fail "$what has ended.  Its last words may say what to change:"
		turn=$((turn + 1))
		[ "$turn" -lt 600 ] ||
		    fail "$what is not ready after a minute.  It says:"
		[ "$turn" != 50 ] || echo "waiting for $what"
		sleep 0.1
	done
}

# ---------------------------------------------------------------- preparation

need='cc /usr/include/stdio.h make musl-gcc /usr/bin/python3'
[ "$system" ] || need="$need clamd"
# shellcheck disable=SC2086
install_missing "$dir/install.log" $need
for what in $MISSING; do
	# make then uses cc
	[ "$what" = musl-gcc ] || fail "cannot do without $what"
done

make -s >"$dir/make.log" 2>&1 || fail "make fails:"
mkdir "$dir/spool" "$dir/mail" "$dir/clamd" "$dir/db"

# Nothing here needs root, and a service should have a user of its own.
us='' scanner=''
if [ "$(id -u)" = 0 ]; then
	us='User: nobody'
	chown nobody "$dir/spool"
	if id clamav >/dev/null 2>&1; then
		scanner='User clamav'
		chown clamav "$dir/clamd"
	fi
fi

# ---------------------------------------------------------------- the scanner

if [ "$system" ]; then
	address=
	for socket in /run/clamav/clamd.sock /var/run/clamav/clamd.ctl \
	    /var/run/clamav/clamd; do
		[ ! -S "$socket" ] || address=${address:-$socket}
	done
	[ "$address" ] || fail "no clamd of this machine has a socket in /run/clamav"
	knows="this machine's own"
else
	address=$dir/clamd/socket
	knows='knows one "virus", the harmless EICAR test file'
	# The test file's text, in hexadecimal.
	printf '%s' 'Eicar-Test-Signature:0:*:58354f2150254041505b345c505a58353428' \
	    '505e2937434329377d2445494341522d5354414e444152442d414e5449564952' \
	    '55532d544553542d46494c452124482b482a' >"$dir/db/demo.ndb"
	echo >>"$dir/db/demo.ndb"
	cat >"$dir/clamd.conf" <<-EOF
		DatabaseDirectory $dir/db
		LocalSocket $address
		LocalSocketMode 666
		TemporaryDirectory $dir/clamd
		Foreground yes
		$scanner
	EOF
	# A copy, for AppArmor confines the installed one to its usual places.
	cp "$(command -v clamd)" "$dir/clamd/clamd"
	"$dir/clamd/clamd" -c "$dir/clamd.conf" >"$dir/clamd.log" 2>&1 &
	pids="$pids $!"
	wait_for clamd $! test -S "$address"
fi

# ---------------------------------------------------------------- the others

PYTHONDONTWRITEBYTECODE=1
export PYTHONDONTWRITEBYTECODE
"$PYTHON" tests/demo.py sink "$dir/mail" >"$dir/sink.log" 2>&1 &
pids="$pids $!"
wait_for "the next hop" $! test -e "$dir/mail/port"
hop=127.0.0.1:$(cat "$dir/mail/port")

cat >"$dir/clamsmtpd.conf" <<EOF
Listen: 127.0.0.1:0
OutAddress: $hop
ClamAddress: $address
Action: bounce
TempDirectory: $dir/spool
$us
EOF
./clamsmtpd -d 3 -f "$dir/clamsmtpd.conf" >"$dir/clamsmtpd.log" 2>&1 &
filter=$!
pids="$pids $filter"
wait_for clamsmtpd $filter grep -q 'listening on' "$dir/clamsmtpd.log"
here=$(sed -n 's/.*listening on //p' "$dir/clamsmtpd.log" | head -n 1)

cat <<EOF

  sender  --->  clamsmtpd  --->  next hop (the mail server that takes the mail)
                    |
                  clamd, the virus scanner: $knows

  clamsmtpd listens on $here, with this configuration file:

EOF
sed '/^$/d; s/^/    /' "$dir/clamsmtpd.conf"

# ---------------------------------------------------------------- three mails

mails()
{
	find "$dir/mail" -name '[0-9]*' ! -name '*.new' | wc -l
}

# show KIND TITLE
show()
{
	before=$(mails)
	seen=$(wc -l <"$dir/clamsmtpd.log")
	"$PYTHON" tests/demo.py write "$1" "$dir/$1.eml" || fail "no mail"
	echo
	echo "== $2"
	echo
	reply=$("$PYTHON" tests/demo.py send "$here" "$dir/$1.eml" 2>&1)
	echo "  the sender got       $reply"
	wait_for clamsmtpd $filter log_line
	after=$(mails)
	if [ "$((after))" = "$((before))" ]; then
		echo "  the next hop got     nothing"
	else
		echo "  the next hop got     this mail:"
		sed 's/^/      | /' "$dir/mail/$((after))" | tr -d '\r'
	fi
	tail -n "+$((seen + 1))" "$dir/clamsmtpd.log" | sed -n '/status=/{
		s/^clamsmtpd: //
		s/^/  clamsmtpd logged     /
		p
	}'
}

log_line()
{
	tail -n "+$((seen + 1))" "$dir/clamsmtpd.log" | grep -q status=
}

show clean "a clean mail: it passes, with one header more"
show eicar "a mail with the EICAR test file attached: refused"
show zipped "the same, with the file in a zip archive: refused"

delivered=$(($(mails))) refused=$(grep -c status=VIRUS "$dir/clamsmtpd.log")
[ "$delivered $refused" = "1 2" ] ||
    fail "this went wrong: $delivered mails delivered, $refused refused"

# row NAME: prints the last column of this row of the measurements
row()
{
	awk -F ' *[|] *' -v name="$1" '$2 == name { print $5; exit }' \
	    bench/results/bench.md
}

cat <<EOF

== one clean mail was delivered, two infected mails were refused

  Measured before; in brackets the CPU compared with a plain TCP proxy's:

  CPU for a mail of 2 KB     $(row "CPU per message, 2 KB, one session each")
  CPU for 1 MB of mail       $(row "CPU per MB, 1 MB messages")
  memory when idle           $(row "resident, idle")

== how to go on

  "Build and install" in README.md: get clamd running, install clamsmtpd
EOF
[ -z "$INSTALLED" ] || echo "  installed for this:$INSTALLED"
# shellcheck disable=SC2086
[ -z "$OFF" ] || echo "  not started and not enabled, that is yours to do:" $OFF
echo

[ "$keep" ] || exit 0
trap - EXIT HUP INT TERM
cat <<EOF
== it goes on running

  send a mail      $PYTHON tests/demo.py send $here $dir/eicar.eml
  by hand          nc ${here%:*} ${here##*:}    (EHLO me, MAIL FROM:<a@example.com>, ...)
EOF
if have swaks; then
	echo "                   swaks --server $here --to you@example.com --attach @FILE"
fi
cat <<EOF
  mail that came   $dir/mail/
  the log          $dir/clamsmtpd.log
  the end          kill$pids; rm -rf $dir
EOF
