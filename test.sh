#!/bin/sh
# usage: ./test.sh [full | cross] [pytest arguments, as -k EXPRESSION]
#
# Installs what is missing, builds, runs the tests; the last line says how many
# passed and failed.  About five minutes on two cores.
#
#   ./test.sh           the whole suite; a core of it again with clang and
#                       this system's libc, with the sanitizers, and with a
#                       program that reads and writes single bytes; a short
#                       soak; warnings, manual pages, scripts, size
#   ./test.sh full      the whole suite in all four builds, the long cases, and
#                       the core for other CPUs: an hour
#   ./test.sh cross     the whole suite for other CPUs, mostly in qemu: an hour
#   ./test.sh -k quarantine     only these, in the normal build
#
# Leaves nothing behind but ./clamsmtpd and, when a case failed, its files.

# Functions are called by check, which shellcheck does not see:
# shellcheck disable=SC2317,SC2329

set -u
cd "$(dirname "$0")" || exit 1
# shellcheck source=tests/install.sh
. tests/install.sh

full='' cross=''
case ${1-} in
full)	full=yes
	shift ;;
cross)	cross=yes
	shift ;;
esac
case ${1--} in
-h | --help)	usage 0 ;;
-*)	;;
*)	[ -e "${1%%::*}" ] || usage 2 ;;
esac
# The builds below have their own flags.
unset CC CPPFLAGS CFLAGS LDFLAGS

# With pytest arguments run only the selected cases, not everything.
few=
[ $# = 0 ] || few=yes

sudo=
tmp=$(scratch test) || exit 1
TMPDIR=${tmp%/*}
export TMPDIR
trap '$sudo rm -rf "$tmp"; exit 1' HUP INT TERM

passed=0 failed=0 skipped=0 selected=0

# finish: ends the run, says where the files are, and prints the counts
finish()
{
	if [ "$few" ] && [ "$failed$selected" = 00 ]; then
		failed=1
		echo "FAILED: no case was selected"
	fi
	if [ "$failed" = 0 ]; then
		$sudo rm -rf "$tmp"
	else
		echo "files of what failed: $tmp"
	fi
	if [ "$skipped" = 0 ]; then
		echo "$passed passed, $failed failed"
	else
		echo "$passed passed, $failed failed, $skipped skipped"
	fi
	[ "$failed" = 0 ]
	exit
}

# check NAME COMMAND...: runs the command as one case
check()
{
	name=$1 log=$tmp/$1.log
	shift
	if "$@" >"$log" 2>&1; then
		passed=$((passed + 1))
	else
		failed=$((failed + 1))
		echo "FAILED: $name: $*"
		tail -n 20 "$log"
	fi
}

skip()
{
	skipped=$((skipped + 1))
	echo "SKIPPED: $1: $2"
}

# build NAME MAKE-ARGUMENT...: builds another program from a copy of the sources
build()
{
	dir=$tmp/build-$1
	shift
	mkdir -p "$dir" && cp ./*.c ./*.h Makefile "$dir" &&
	    make -s -C "$dir" BIN="$dir/clamsmtpd" "$@" &&
	    [ -x "$dir/clamsmtpd" ]
}

# lint PAGE: mandoc has no complaint.  Complaints about other manual pages of this
# machine, which some versions of mandoc have, do not count.
lint()
{
	! mandoc -T lint "$1" 2>&1 |
	    grep -v -e mandoc.db -e 'referenced manual not found'
}

size_below()
{
	strip -o "$tmp/stripped" "$2" && size=$(wc -c <"$tmp/stripped") &&
	    echo "$size bytes stripped" && [ "$size" -le "$1" ]
}

# static PROGRAM: the program needs no loader
static()
{
	! readelf -l "$1" | grep INTERP
}

# suite NAME PROGRAM PYTEST-ARGUMENT...: runs pytest and adds up its cases
suite()
{
	name=$1 program=$2
	shift 2
	echo
	echo "== $name"
	run_pytest "$@"
	status=$?
	if [ "$status" = 77 ]; then
		skip "$name" "the reason is above"
		return
	fi
	counts=$(count "$tmp/$name.xml") || counts='0 0 0'
	# shellcheck disable=SC2086
	set -- $counts
	passed=$((passed + $1)) failed=$((failed + $2)) skipped=$((skipped + $3))
	selected=$((selected + $1 + $2 + $3))
	# pytest returns 0 if all passed, 1 if some failed, 5 if none was selected.
	case $status in
	0 | 5)	return ;;
	1)	[ "$2" = 0 ] || return ;;
	esac
	failed=$((failed + 1))
	echo "FAILED: $name: pytest itself, exit status $status"
}

# shellcheck disable=SC2086
run_pytest()
{
	$sudo env TMPDIR="$TMPDIR" CLAMSMTPD="$program" TEST_BYTES="$bytes" \
	    TEST_WAIT="$patience" PYTHONDONTWRITEBYTECODE=1 \
	    ASAN_OPTIONS=detect_stack_use_after_return=1:strict_string_checks=1 \
	    UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 \
	    $prefix "$PYTHON" -m pytest -q -rfEs --tb=short -p no:cacheprovider \
	    -n "$cpus" --basetemp="$tmp/$name" --junitxml="$tmp/$name.xml" "$@"
}

# count FILE: prints passed, failed and skipped of pytest's report
count()
{
	"$PYTHON" - "$1" <<-'EOF'
		import sys, xml.etree.ElementTree as tree
		every = bad = skipped = 0
		for suite in tree.parse(sys.argv[1]).getroot().iter("testsuite"):
		    every += int(suite.get("tests"))
		    bad += int(suite.get("failures")) + int(suite.get("errors"))
		    skipped += int(suite.get("skipped"))
		print(every - bad - skipped, bad, skipped)
	EOF
}

# other_cpus PYTEST-ARGUMENT...: tests/cross.sh builds the program
other_cpus()
{
	for cpu in arm64 armhf i386 mips mipsel riscv64 s390x clang; do
		prefix="tests/cross.sh $cpu $tmp/cross"
		suite "$cpu" "$normal" --ignore-glob='*packaging*' \
		    --ignore=tests/test_build.py --ignore=tests/test_commands.py \
		    --ignore=tests/test_faults.py "$@" tests
	done
	prefix=''
}

# ---------------------------------------------------------------- the run

if [ "$(id -u)" = 0 ]; then
	:
elif sudo -n true 2>/dev/null; then
	sudo='sudo -n'
	echo "the tests run with sudo: some need root"
else
	echo "not root: the cases that need it are skipped"
fi
prefix='' bytes=''
# A case fails after waiting this many seconds.  A slow disk needs many.
if [ "$full" ]; then patience=90; else patience=30; fi
patience=${TEST_WAIT:-$patience}
cpus=$(getconf _NPROCESSORS_ONLN 2>/dev/null || nproc)

install_missing "$tmp/install.log" cc /usr/include/stdio.h make musl-gcc clang \
    /usr/bin/python3 py:pytest py:xdist clamd /usr/share/clamav-testfiles \
    ss nft mandoc shellcheck busybox crun strace systemd-analyze py:yaml \
    dpkg-buildpackage haproxy py:ensurepip
for what in cc make py:pytest py:xdist; do
	case " $MISSING " in
	*" $what "*)
		tail -n 5 "$tmp/install.log"
		echo "FAILED: cannot do without $what"
		failed=1
		finish ;;
	esac
done
[ -z "$MISSING" ] || echo "not to be had:$MISSING"

check make make -s
[ "$failed" = 0 ] || finish
normal=$tmp/clamsmtpd
cp clamsmtpd "$normal"		# a later make does not change the copy

if [ "$cross" ]; then
	other_cpus -m 'not long' "$@"
	finish
fi
if [ "$few" ] && [ ! "$full" ]; then
	where=tests
	for arg do
		[ ! -e "${arg%%::*}" ] || where=
	done
	suite tests "$normal" "$@" $where
	finish
fi

# -- what needs no daemon

warn="-std=c99 -Wall -Wextra -Werror -Wshadow -Wpointer-arith -Wcast-qual \
-Wwrite-strings -Wstrict-prototypes -Wmissing-prototypes -Wformat=2 \
-Wno-format-nonliteral -Wundef \
-Wvla"
check gcc build gcc CC=gcc LDFLAGS= \
    CFLAGS="-O2 $warn -Wlogical-op -Wduplicated-cond"
if have clang; then
	check clang build clang CC=clang CFLAGS="-O2 $warn" LDFLAGS=
else
	skip clang "not installed"
fi
if have musl-gcc || have apk; then
	check static static clamsmtpd
else
	skip static "no musl here"
fi
if [ "$(uname -m)" = x86_64 ] && have musl-gcc; then
	check size size_below 163840 clamsmtpd
else
	skip size "the limit is for x86_64 and musl"
fi
scripts=
for f in test.sh demo.sh .ci/run tests/*.sh tests/vm/*.sh fuzz/run prove/run \
    docs/examples/transparent/tproxy-routes; do
	if [ -f "$f" ] && head -n 1 "$f" | grep -q '^#!.*sh$'; then
		scripts="$scripts $f"
	fi
done
# shellcheck disable=SC2086
if have shellcheck; then
	check shellcheck shellcheck -x $scripts
else
	skip shellcheck "not installed"
fi
for f in $scripts; do
	if have busybox; then
		check "busybox-$(basename "$f")" busybox sh -n "$f"
	else
		skip "busybox-$(basename "$f")" "no busybox here"
	fi
done
for f in *.[1-9]; do
	if have mandoc; then
		check "$f" lint "$f"
	else
		skip "$f" "mandoc not installed"
	fi
done

# -- the suite, in the normal build

without=''
if ! have postfix; then
	# Postfix would replace this machine's mail server.
	prefix='tests/overlay.sh postfix --'
	suite postfix "$normal" -m postfix "$@" tests
	prefix='' without=' and not postfix'
fi
suite normal "$normal" -m "not long$without" "$@" tests

if [ "$full" ]; then
	check prove prove/run full
else
	check prove prove/run quick
fi
check soak soak/run --seed 1 --messages 2000 --program "$normal"

# -- and in special ones

if [ "$full" ]; then part='not long'; else part=core; fi
part=$part$without
if have clang; then
	suite clang "$tmp/build-clang/clamsmtpd" -m "$part" "$@" tests
fi
for cc in gcc clang; do
	# gcc may have no sanitizer library, as on Alpine, while clang has one
	echo 'int main(void) { return 0; }' >"$tmp/try.c"
	"$cc" -fsanitize=address,undefined -o "$tmp/try" "$tmp/try.c" \
	    2>/dev/null && "$tmp/try" && break
	cc=
done
if [ "$cc" ]; then
	sanitize='-fsanitize=address,undefined -fno-sanitize-recover=all'
	check sanitize build sanitize CC="$cc" LDFLAGS="$sanitize" \
	    CFLAGS="-O1 -g -fno-omit-frame-pointer $sanitize"
	check fuzz env CC="$cc" fuzz/run replay
	check soak-sanitizers soak/run --seed 1 --messages 1000 \
	    --program "$tmp/build-sanitize/clamsmtpd"
	suite sanitizers "$tmp/build-sanitize/clamsmtpd" -m "$part" "$@" tests
else
	skip sanitizers "no compiler has them here"
fi
check bytes build bytes CFLAGS='-O2 -DIO_MAX=1'
bytes=1		# cases with large mails use smaller ones, or take minutes
suite one-byte "$tmp/build-bytes/clamsmtpd" -m "$part" "$@" tests
bytes=

if [ "$full" ]; then
	suite long "$normal" -m "long$without" "$@" tests
	other_cpus -m core "$@"
fi
finish
