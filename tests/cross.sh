#!/bin/sh
# usage: tests/cross.sh CPU DIRECTORY COMMAND [ARGUMENT...]
#
# Builds clamsmtpd for another CPU and runs a command, pytest above all, with
# CLAMSMTPD set to what runs it there: mostly qemu, then TEST_QEMU is set, too.
# CPU is arm64, armhf, i386, mips, s390x; or clang: this one, by that compiler.
#
# The program is static: with a musl built from Debian's source package, else
# with glibc.  What was built stays in the directory, for the next time.
#
# Exit status 77 and a reason where compiler or qemu cannot be had, 2 when the
# build fails; else the command's.

set -u
cpu=${1-}
case $cpu in
arm64)	triplet=aarch64-linux-gnu qemu=qemu-aarch64 ;;
armhf)	triplet=arm-linux-gnueabihf qemu=qemu-arm ;;
i386)	triplet=i686-linux-gnu qemu=qemu-i386 ;;
mips)	triplet=mips-linux-gnu qemu=qemu-mips ;;
s390x)	triplet=s390x-linux-gnu qemu=qemu-s390x ;;
clang)	triplet='' qemu='' ;;
*)	sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
	exit 2 ;;
esac
mkdir -p "$2" && dir=$(cd "$2" && pwd) || exit 2
shift 2
top=$(cd "$(dirname "$0")/.." && pwd)
# shellcheck source=tests/install.sh
. "$top/tests/install.sh"
log=$dir/$cpu.log

stop()
{
	status=$1
	shift
	[ ! -s "$log" ] || tail -n 5 "$log"
	echo "cross: $cpu: $*"
	exit "$status"
} >&2

# Debian's source package, from where apt has its binary ones.
musl_source()
(
	[ -e "$dir/source/configure" ] && exit
	mkdir -p "$dir/apt/lists/partial" && cd "$dir/apt" || exit
	for f in /etc/apt/sources.list /etc/apt/sources.list.d/*; do
		[ ! -f "$f" ] || sed -e 's/^deb /deb-src /' \
		    -e 's/^Types:.*/Types: deb-src/' "$f" >"${f##*/}"
	done
	get()
	{
		apt-get -q -o Dir::Etc::SourceList=/dev/null \
		    -o Dir::Etc::SourceParts="$dir/apt" \
		    -o Dir::State::Lists="$dir/apt/lists" \
		    -o Dir::Cache="$dir/apt/cache" "$@"
	}
	get update	# fails for one source without source packages, too
	get source musl && mv musl-*/ "$dir/source"
)

# Its own wrapper for the compiler is then in bin/.
musl_build()
(
	mkdir -p "$dir/$cpu" && cd "$dir/$cpu" || exit
	[ -e config.mak ] || ../source/configure --prefix="$PWD" \
	    --disable-shared --enable-wrapper=yes CC="$cc" \
	    ${triplet:+CROSS_COMPILE=$triplet-} || exit
	make -s -j "$(nproc)" install
)

cc=${triplet:+$triplet-gcc}
cc=${cc:-clang}
# shellcheck disable=SC2086
install_missing "$log" make "$cc" $qemu dpkg-source
for what in make "$cc" $qemu; do
	have "$what" || stop 77 "no $what to be had"
done

if musl_source >"$log" 2>&1; then
	musl_build >"$log" 2>&1 || stop 2 "musl cannot be built"
	libc="musl $(cat "$dir/source/VERSION")"
	cc=$(echo "$dir/$cpu/bin/musl-"*)
elif [ "$triplet" ]; then
	tail -n 1 "$log"
	libc="glibc, for there is no source package of musl to be had"
	install_missing "$log" "/usr/$triplet/include/stdio.h"
else
	stop 77 "no source package of musl to be had"
fi
program=$dir/$cpu.elf
# musl-clang knows what it does not use
make -s -C "$top" CC="$cc" BIN="$program" \
    CPPFLAGS='-Werror -Wno-unused-command-line-argument' >"$log" 2>&1 ||
    stop 2 "clamsmtpd cannot be built"

# A 64-bit x86 mostly runs 32-bit programs itself: quicker, and all of a kernel.
case $cpu,$(uname -m) in
i386,x86_64)	! "$program" -v >"$log" 2>&1 || qemu='' ;;
esac
echo "$cpu: $(($(wc -c <"$program"))) bytes, $libc${qemu:+; runs in $qemu}"
CLAMSMTPD=$program
if [ "$qemu" ]; then
	CLAMSMTPD=$dir/$cpu.sh TEST_QEMU=$qemu
	printf '#!/bin/sh\nexec %s "%s" "$@"\n' "$qemu" "$program" >"$CLAMSMTPD"
	chmod +x "$CLAMSMTPD"
	export TEST_QEMU
fi
export CLAMSMTPD
exec "$@"
