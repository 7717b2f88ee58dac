#!/bin/sh
# usage: tests/overlay.sh PACKAGE... -- COMMAND [ARGUMENT...]
#
# Runs a command, as root, on a copy of this machine that has more packages.  The
# copy is an overlay over / in a private mount namespace.  It keeps all changes on
# a tmpfs, and the packages are installed in it.  This is for packages that must
# not be installed here, above all another MTA.  Nothing outside is changed.  /tmp
# and the working directory are the real ones, and the network is shared.
#
# The exit status is that of the command, or 77 with a reason if there can be no
# overlay.

set -eu
no() { echo "overlay: $*" >&2; exit 77; }

if [ "${1-}" != --inside ]; then
	[ "$(id -u)" = 0 ] || no "needs root"
	command -v unshare >/dev/null || no "no unshare here"
	kill=
	if unshare --help 2>&1 | grep -q kill-child; then kill=--kill-child; fi
	# -p: all that the command leaves running ends with it
	unshare -m -p -f true 2>/dev/null ||
	    no "no private mount and pid namespace to be had"
	dir=$(mktemp -d /tmp/clamsmtpd-overlay.XXXXXX)
	trap 'rmdir "$dir"' EXIT
	trap 'exit 1' HUP INT TERM
	status=0
	unshare -m -p -f $kill "$0" --inside "$dir" "$@" || status=$?
	exit "$status"
fi

dir=$2
shift 2
list=
while [ "$1" != -- ]; do
	list="$list $1"
	shift
done
shift

# layer DIRECTORY: mounts an overlay over it at its place under the new root
layers=0
layer()
{
	layers=$((layers + 1))
	mkdir "$dir/upper$layers" "$dir/work$layers"
	mount -t overlay -o "lowerdir=$1,upperdir=$dir/upper$layers" \
	    -o "workdir=$dir/work$layers" overlay "$dir/root$1" 2>/dev/null ||
	    no "overlay over $1 refused"
}
mount -t tmpfs -o mode=755 tmpfs "$dir" 2>/dev/null || no "tmpfs refused"
mkdir "$dir/root"
layer /
while read -r _ where _; do
	case $where in
	# Skip a file that is bound over another, as containers have them.
	/usr | /usr/* | /var | /var/* | /etc | /etc/* | /opt | /opt/*)
		[ ! -d "$where" ] || layer "$where" ;;
	esac
done </proc/self/mounts
for f in resolv.conf hosts hostname; do
	# In many places these are bound over, or linked to /run.
	[ -e "/etc/$f" ] || continue
	rm -f "$dir/root/etc/$f"
	cat "/etc/$f" >"$dir/root/etc/$f"
done
mount -t proc proc "$dir/root/proc"
mount -o rbind /sys "$dir/root/sys"
mount -o rbind /dev "$dir/root/dev"
[ -e "$dir/root/etc/hosts" ] || echo 127.0.0.1 localhost >"$dir/root/etc/hosts"
# With an empty /run the scripts of the packages find no init to talk to.
mount -t tmpfs -o mode=755 tmpfs "$dir/root/run"
mkdir -p "$dir/root/run/lock"
mount -o bind /tmp "$dir/root/tmp"
for d in "$(pwd)" "${TMPDIR:-/tmp}"; do
	case $d in
	/tmp | /tmp/*) ;;
	*)	mkdir -p "$dir/root$d"
		mount -o bind "$d" "$dir/root$d" ;;
	esac
done
rm -f "$dir/root/usr/sbin/policy-rc.d"
printf '#!/bin/sh\nexit 101\n' >"$dir/root/usr/sbin/policy-rc.d"
chmod 755 "$dir/root/usr/sbin/policy-rc.d"
# The index of all manual pages takes longest, and is not needed here.
rm -f "$dir/root/var/lib/man-db/auto-update"

# shellcheck disable=SC2016
exec chroot "$dir/root" /bin/sh -c '
	cd "$1" || exit 77
	list=$2
	shift 2
	if command -v apt-get >/dev/null; then
		export DEBIAN_FRONTEND=noninteractive NEEDRESTART_SUSPEND=1
		get() { apt-get -q -y --no-install-recommends install $list; }
		again() { apt-get -q update; get; }
	else
		get() { apk add --no-cache $list; }
		again() { false; }
	fi
	log=$(mktemp)
	if ! get >"$log" 2>&1 </dev/null && ! again >>"$log" 2>&1 </dev/null; then
		echo "overlay: cannot install$list:" >&2
		tail -n 5 "$log" >&2
		rm -f "$log"
		exit 77
	fi
	rm -f "$log"
	exec "$@"' sh "$(pwd)" "$list" "$@"
