#!/bin/sh
# usage: tests/cross.sh CPU DIRECTORY COMMAND [ARGUMENT...]
#
# Builds clamsmtpd for another CPU and runs a command, usually pytest.  CLAMSMTPD
# is set to what runs the program, mostly with qemu; with qemu TEST_QEMU is set,
# too.  CPU is arm64, armhf, i386, mips, mipsel, riscv64 or s390x; clang is this
# machine's CPU, with that compiler.
#
# The compiler and musl are those of the Python package ziglang, in an environment
# of its own.  DIRECTORY keeps all that was built, for the next run.
#
# The exit status is that of the command.  It is 2 if the build fails, and 77 with
# a reason if the compiler or qemu cannot be installed.

set -u
top=$(cd "$(dirname "$0")/.." && pwd)
# shellcheck source=tests/install.sh
. "$top/tests/install.sh"

cpu=${1-}
# The oldest models that Alpine and OpenWrt build for.
case $cpu in
arm64)	target=aarch64-linux-musl qemu=qemu-aarch64 ;;
armhf)	target='arm-linux-musleabihf -mcpu=arm1176jzf_s' qemu=qemu-arm ;;
i386)	target=x86-linux-musl qemu=qemu-i386 ;;
mips)	target=mips-linux-musleabi qemu=qemu-mips ;;
mipsel)	target=mipsel-linux-musleabi qemu=qemu-mipsel ;;
riscv64)	target=riscv64-linux-musl qemu=qemu-riscv64 ;;
s390x)	target=s390x-linux-musl qemu=qemu-s390x ;;
clang)	target=$(uname -m)-linux-musl qemu='' ;;
*)	usage 2 ;;
esac
mkdir -p "$2" && dir=$(cd "$2" && pwd) || exit 2
shift 2
log=$dir/$cpu.log

stop()
{
	status=$1
	shift
	[ ! -s "$log" ] || tail -n 5 "$log"
	echo "cross: $cpu: $*"
	exit "$status"
} >&2

# shellcheck disable=SC2086
install_missing "$log" make $qemu py:ensurepip
for what in make $qemu; do
	have "$what" || stop 77 "no $what to be had"
done
zig=$dir/zig/bin/python
"$zig" -m ziglang version >/dev/null 2>&1 || {
	"$PYTHON" -m venv "$dir/zig" &&
	    "$dir/zig/bin/pip" -q --disable-pip-version-check install ziglang
} >"$log" 2>&1 || stop 77 "no Python package ziglang to be had"

program=$dir/$cpu.elf
# zig also builds musl, and keeps the result.
ZIG_GLOBAL_CACHE_DIR=$dir/cache ZIG_LOCAL_CACHE_DIR=$dir/cache \
    make -s -C "$top" CC="$zig -m ziglang cc -target $target" BIN="$program" \
    LDFLAGS='-static-pie -fPIE -s' \
    CPPFLAGS='-Werror -Wno-unused-command-line-argument' >"$log" 2>&1 ||
    stop 2 "clamsmtpd cannot be built"

# Most 64-bit x86 kernels run 32-bit programs themselves.  That is faster than
# qemu, and has all system calls.
case $cpu,$(uname -m) in
i386,x86_64)	! "$program" -v >"$log" 2>&1 || qemu='' ;;
esac
echo "$cpu: $(($(wc -c <"$program"))) bytes, ziglang" \
    "$("$zig" -m ziglang version)${qemu:+; runs in $qemu}"
CLAMSMTPD=$program
if [ "$qemu" ]; then
	CLAMSMTPD=$dir/$cpu.sh TEST_QEMU=$qemu
	printf '#!/bin/sh\nexec %s "%s" "$@"\n' "$qemu" "$program" >"$CLAMSMTPD"
	chmod +x "$CLAMSMTPD"
	export TEST_QEMU
fi
export CLAMSMTPD
exec "$@"
