# Installs what is missing; sourced by test.sh and demo.sh.
# The machine may be a live mail relay: nothing is removed, nothing is
# configured, no service is started, now or at the next boot.
# shellcheck shell=sh

PATH=$PATH:/usr/sbin:/sbin

# Other users read and run what is built and written here.
umask 022

# Debian's own Python, which sees Debian's pytest; another one in PATH may not.
PYTHON=/usr/bin/python3

# usage STATUS: prints the comment at the top of the script, ends it
usage()
{
	sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
	exit "$1"
}

# suitable DIRECTORY: other users can enter it, programs in it run, and a socket
# below it has a short enough path (107 characters at most)
suitable()
{
	[ "${#1}" -le 16 ] || return
	up=$1
	until [ "$up" = / ]; do
		case $(ls -ld "$up/." 2>/dev/null) in
		d????????[xt]*) up=$(dirname "$up") ;;
		*)	return 1 ;;
		esac
	done
	try=$(mktemp "$1/clamsmtpd-try.XXXXXX" 2>/dev/null) || return
	printf '#!/bin/sh\n' >"$try" && chmod 755 "$try" && "$try" 2>/dev/null
	set -- "$?"
	rm -f "$try"
	return "$1"
}

# scratch NAME: creates a directory for temporary files and prints its path
scratch()
{
	for where in "${TMPDIR:-/tmp}" /tmp /var/tmp /dev/shm; do
		suitable "$where" || continue
		made=$(mktemp -d "$where/clamsmtpd-$1.XXXXXX") || continue
		chmod 755 "$made" && echo "$made"
		return
	done
	cat >&2 <<-EOF
		No directory for temporary files: ${TMPDIR:-/tmp}, /tmp, /var/tmp and
		/dev/shm are full, closed to other users, or mounted noexec.  Set
		TMPDIR to one of at most 16 characters that is none of this.
	EOF
	return 1
}

# have WHAT: a command, an absolute path, or py:MODULE
have()
{
	case $1 in
	/*)	[ -e "$1" ] ;;
	py:*)	"$PYTHON" -c "import ${1#py:}" 2>/dev/null ;;
	*)	command -v "$1" >/dev/null 2>&1 ;;
	esac
}

# package_of WHAT: prints the Debian package that has it, then the Alpine packages.
# A dash means that there is no such package, or that it is not needed.
package_of()
{
	case $1 in
	cc)		echo gcc build-base ;;
	# gcc alone does not install the headers of a libc
	/usr/include/stdio.h)	echo libc6-dev musl-dev ;;
	make)		echo make make ;;
	musl-gcc)	echo musl-tools - ;;
	# On Alpine gcc has no sanitizers, and those of clang are in compiler-rt.
	clang)		echo clang clang compiler-rt ;;
	/usr/bin/python3)	echo python3 python3 ;;
	py:pytest)	echo python3-pytest py3-pytest ;;
	py:xdist)	echo python3-pytest-xdist py3-pytest-xdist ;;
	clamd)		echo clamav-daemon clamav-daemon ;;
	/usr/share/clamav-testfiles)	echo clamav-testfiles - ;;
	mandoc)		echo mandoc mandoc ;;
	shellcheck)	echo shellcheck shellcheck ;;
	busybox)	echo busybox - ;;
	# for what tests the packages
	crun)		echo crun crun ;;
	strace)		echo strace strace ;;
	systemd-analyze)	echo systemd - ;;
	py:yaml)	echo python3-yaml py3-yaml ;;
	dpkg-buildpackage)	echo dpkg-dev - ;;
	haproxy)	echo haproxy haproxy ;;
	# ss, since busybox has an ip, too, which cannot do all that the tests need
	ss)		echo iproute2 iproute2 ;;
	nft)		echo nftables nftables ;;
	# for tests/cross.sh
	qemu-*)		echo "qemu-user $1" ;;
	py:ensurepip)	echo python3-venv - ;;
	esac
}

as_root()
{
	if [ "$(id -u)" = 0 ]; then "$@"
	elif have sudo; then sudo "$@"
	else doas "$@"
	fi
}

# policy on|off: while the policy is on, and this process lives, Debian's packages
# start no service.  A policy that existed before is left alone.
policy()
{
	as_root sh -s "$1" $$ <<-'EOF'
		f=/usr/sbin/policy-rc.d
		mark='# from the clamsmtpd tests, for the moment only'
		if [ -e "$f" ] && grep -qF "$mark" "$f"; then rm -f "$f"; fi
		if [ "$1" = off ] || [ -e "$f" ]; then exit; fi
		printf '#!/bin/sh\n%s\n[ ! -d /proc/%s ] || exit 101\n' "$mark" "$2" >"$f"
		chmod 755 "$f"
	EOF
}

apt()
{
	# needrestart (Ubuntu) would restart services of others
	as_root env DEBIAN_FRONTEND=noninteractive NEEDRESTART_SUSPEND=1 \
	    apt-get -q -y -o DPkg::Lock::Timeout=300 "$@" </dev/null
}

# boot_units: prints the servers of ours that the next boot starts, one per line
boot_units()
{
	find /etc/systemd/system /etc/rc?.d -type l 2>/dev/null |
	    sed -n -e 's!.*/!!; s!^S[0-9][0-9]!!' -e '/^clamav-/p; /^haproxy/p' |
	    sort -u
}

apt_install()
{
	apt install --no-remove --no-install-recommends \
	    -o Dpkg::Options::=--force-confold "$@"
}

# In a subshell: its trap must not replace one of the caller's.
apt_politely()
(
	off=$1 before=$(boot_units)
	shift
	trap 'policy off' EXIT
	trap 'exit 1' HUP INT TERM
	policy on
	lists=
	for f in /var/lib/apt/lists/*_Packages*; do
		[ ! -e "$f" ] || lists=yes
	done
	if [ -z "$lists" ]; then
		apt update || :
	fi
	if ! apt_install "$@"; then
		[ -z "$lists" ] || apt update || :
		# one by one, so that a package that cannot be installed does not affect others
		apt_install "$@" || for p do apt_install "$p" || :; done
	fi
	# The servers that we installed are for the tests.  They do not start at boot.
	for unit in $(boot_units); do
		case "
$before
" in
		*"
$unit
"*)	continue ;;
		esac
		case $unit in
		*.*)	disable=deb-systemd-helper
			! have systemctl || disable=systemctl
			as_root "$disable" disable "$unit" ;;
		*)	as_root update-rc.d "$unit" disable ;;
		esac && echo "$unit" >>"$off"
	done
)

apk_add()
{
	as_root apk add --no-cache "$@" ||
	    for p do as_root apk add --no-cache "$p" || :; done
}

# install_missing LOGFILE WHAT...: installs what is missing and says so.  Then
# $INSTALLED lists the packages, $MISSING what could not be installed, and $OFF
# the services of these packages, which are not started.
install_missing()
{
	log=$1 INSTALLED='' OFF=''
	shift
	apk=
	have apt-get || ! have apk || apk=yes
	list=
	for what do
		have "$what" && continue
		# shellcheck disable=SC2046
		set_package $(package_of "$what")
		[ "$package" = - ] || list="$list $package"
	done
	if [ "$list" ]; then
		echo "installing:$list"
		# shellcheck disable=SC2086
		if [ "$(id -u)" != 0 ] && ! have sudo && ! have doas; then
			echo "  neither root nor sudo here: have root install them"
		elif [ "$apk" ]; then
			INSTALLED=$list
			apk_add $list >>"$log" 2>&1
		elif have apt-get; then
			INSTALLED=$list
			apt_politely "$log.off" $list >>"$log" 2>&1 || :
			OFF=$(sed 's/\..*//' "$log.off" 2>/dev/null | sort -u)
			[ -z "$OFF" ] || echo "not started, not enabled:" $OFF
		else
			echo "  neither apt-get nor apk here: install their like"
		fi
	fi
	MISSING=
	for what do
		have "$what" && continue
		# shellcheck disable=SC2046
		set_package $(package_of "$what")
		[ "$package" = - ] || MISSING="$MISSING $what"
	done
}

set_package()
{
	package=$1
	shift
	[ -z "$apk" ] || package=$*
}
