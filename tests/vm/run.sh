#!/bin/sh
# usage: tests/vm/run.sh DIRECTORY [SUITE]
#
# Boots a Debian in an emulated machine, with systemd, Postfix, clamd and
# AppArmor, installs this tree's package there and runs guest.sh.  Prints its
# log, and exits with 0 if no check failed.
#
# DIRECTORY gets the root file system (made once per SUITE; remove it to make it
# again), the package and the results: 3 GB.  SUITE is bookworm (the default) or
# trixie.  Run it as root, on Debian with debootstrap, dpkg-dev, debhelper,
# dh-sequence-installsysusers, e2fsprogs and qemu-system-x86.  It needs no KVM,
# takes about ten minutes, and is not part of ./test.sh.

set -eu
umask 022
PATH=$PATH:/usr/sbin:/sbin
case ${1--} in
-*)	sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
	exit 2 ;;
esac
mkdir -p "$1"
dir=$(cd "$1" && pwd)
suite=${2-bookworm}
top=$(cd "$(dirname "$0")/../.." && pwd)
root=$dir/$suite

# The packages of the guest, without the recommended ones: no freshclam runs.
packages=apparmor,clamav-daemon,clamav-testfiles,dbus,initramfs-tools,iproute2
packages=$packages,kmod,linux-image-cloud-amd64,netcat-openbsd,nftables,postfix
packages=$packages,procps,python3-minimal,rsyslog,swaks,systemd-sysv,udev,zstd

if [ ! -e "$root.made" ]; then
	rm -rf "$root"
	echo "making $root"
	DEBIAN_FRONTEND=noninteractive debootstrap --variant=minbase \
	    --include="$packages" "$suite" "$root" >"$root.log" 2>&1 || {
		tail "$root.log"
		exit 1
	}
	for unit in clamav-freshclam.service clamav-freshclam-once.service \
	    clamav-freshclam-once.timer apt-daily.timer \
	    apt-daily-upgrade.timer man-db.timer e2scrub_reap.service; do
		ln -sf /dev/null "$root/etc/systemd/system/$unit"
	done
	# clamd with one signature: the units look for the usual databases.
	for unit in service socket; do
		mkdir -p "$root/etc/systemd/system/clamav-daemon.$unit.d"
		printf '[Unit]\nConditionPathExistsGlob=\n' \
		    >"$root/etc/systemd/system/clamav-daemon.$unit.d/db.conf"
	done
	exe=$root/usr/share/clamav-testfiles/clam.exe
	printf '%s:%s:Test.Clam\n' "$(sha256sum <"$exe" | cut -d' ' -f1)" \
	    "$(wc -c <"$exe")" >"$root/var/lib/clamav/test.hsb"
	echo vm >"$root/etc/hostname"
	echo '127.0.0.1 localhost vm vm.example' >"$root/etc/hosts"
	echo '/dev/vda / ext4 rw 0 1' >"$root/etc/fstab"
	cat >"$root/etc/systemd/system/guest.service" <<-'E'
	[Unit]
	Description=guest.sh, from the second disk; results to the third
	After=postfix.service clamav-daemon.service
	[Service]
	Type=oneshot
	ExecStart=/bin/sh -c 'mkdir -p /job/results && tar -C /job -xf /dev/vdb; cd /job; sh guest.sh 2>&1 | tee results/log >/dev/console; tar -cf /dev/vdc results; systemctl --no-block poweroff'
	TimeoutStartSec=infinity
	[Install]
	WantedBy=multi-user.target
	E
	ln -sf ../guest.service "$root/etc/systemd/system/multi-user.target.wants/"
	mke2fs -q -F -t ext4 -d "$root" "$root.img" 3G
	touch "$root.made"
fi

echo "building the package"
rm -rf "$dir/job" "$dir/build" "$dir"/clamsmtp*
mkdir "$dir/job" "$dir/build"
(cd "$top" && git ls-files -z | xargs -0 cp --parents -t "$dir/build")
cp -r "$top/packaging/debian" "$dir/build"
(cd "$dir/build" && DEB_BUILD_OPTIONS=nocheck dpkg-buildpackage -b -us -uc) \
    >"$dir/build.log" 2>&1 || { tail "$dir/build.log"; exit 1; }
cp "$dir"/clamsmtp_*.deb "$top/tests/vm/guest.sh" "$dir/job"
tar -C "$dir/job" -cf "$dir/job.tar" .
truncate -s %512 "$dir/job.tar"
rm -f "$dir/results.tar"
truncate -s 64M "$dir/results.tar"

# Loading kvm in an emulated CPU takes minutes.
timeout 3600 qemu-system-x86_64 -M q35 -cpu max -accel tcg,thread=multi \
    -smp 2 -m 2048 -nodefaults -nographic -no-reboot \
    -kernel "$root"/boot/vmlinuz-* -initrd "$root"/boot/initrd.img-* \
    -append "root=/dev/vda console=ttyS0 quiet net.ifnames=0 mitigations=off \
modprobe.blacklist=kvm,kvm_amd,kvm_intel" -serial stdio \
    -object rng-random,filename=/dev/urandom,id=rng \
    -device virtio-rng-pci,rng=rng \
    -drive "file=$root.img,if=virtio,format=raw,snapshot=on" \
    -drive "file=$dir/job.tar,if=virtio,format=raw,snapshot=on" \
    -drive "file=$dir/results.tar,if=virtio,format=raw" </dev/null

rm -rf "$dir/results"
tar -C "$dir" -xf "$dir/results.tar"
tail -n 1 "$dir/results/log" | grep -q '^[1-9][0-9]* passed, 0 failed$'
