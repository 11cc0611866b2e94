#!/bin/busybox sh
# Init program of the guest: makes the host's files its root, then runs guest.sh from the "out"
# share.
#
#   /host   root of the host, 9p, read-only
#   /upper  tmpfs for the guest's writes
#   /out    folder of the run, 9p, writable; has mounts.sh (folders to mount and their kinds) and guest.sh
#   /root   overlay of /host and /upper: the new root
/bin/busybox --install -s /bin
export PATH=/bin

die() {
    echo "init: $*" > /dev/console
    poweroff -f
}

mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
for module in /modules/*.ko; do
    insmod "$module" || die "cannot load $module"
done

if grep -qw vm.probe /proc/cmdline; then
    echo "init: alive" > /dev/console
    poweroff -f
fi

NINE=trans=virtio,version=9p2000.L,msize=512000
mount -t 9p -o "$NINE,cache=loose,ro" host /host || die "cannot mount the host's files"
mount -t 9p -o "$NINE,cache=none" out /out || die "cannot mount the run's folder"
mount -t tmpfs -o mode=755,size=75% upper /upper

# writable FOLDER AT: mounts an overlay of FOLDER at AT that keeps writes in memory.
layers=0
writable() {
    layers=$((layers + 1))
    mkdir -p "/upper/$layers/up" "/upper/$layers/work" "$2"
    mount -t overlay -o "lowerdir=$1,upperdir=/upper/$layers/up,workdir=/upper/$layers/work" overlay "$2" ||
        die "cannot lay a writable layer over $1"
}

writable /host /root
mount -t proc proc /root/proc
mount -t sysfs sys /root/sys
mount -t devtmpfs dev /root/dev
mkdir -p /root/dev/shm /root/dev/pts /root/dev/virtio-ports
mount -t tmpfs -o mode=1777 shm /root/dev/shm
mount -t devpts -o gid=5,mode=620,ptmxmode=666 devpts /root/dev/pts
mount -t tmpfs -o mode=755 run /root/run
mount -t tmpfs -o mode=1777,size=75% tmp /root/tmp
ln -sfn /proc/self/fd /root/dev/fd
ln -sfn /proc/self/fd/0 /root/dev/stdin
ln -sfn /proc/self/fd/1 /root/dev/stdout
ln -sfn /proc/self/fd/2 /root/dev/stderr
for port in /sys/class/virtio-ports/*; do
    [ -e "$port/name" ] && ln -sfn "/dev/${port##*/}" "/root/dev/virtio-ports/$(cat "$port/name")"
done
ip link set lo up

# keep FOLDER: makes FOLDER visible if a tmpfs hides it (the workspace may lie below /tmp).
keep() {
    case "$1/" in
    /tmp/* | /run/* | /dev/*) writable "/host$1" "/root$1" ;;
    esac
}
# share TAG FOLDER: mounts a share that the guest may write to.
share() {
    mkdir -p "/root$2"
    mount -t 9p -o "$NINE,cache=none" "$1" "/root$2" || die "cannot mount the share $2"
}
# modules FOLDER RELEASE: mounts this kernel's modules for modprobe.
modules() {
    mkdir -p "/root/lib/modules/$2"
    mount --bind "/host$1" "/root/lib/modules/$2" || die "cannot mount the modules"
}
. /out/mounts.sh
# The run's folder is also at its path on the host. A 9p channel can be mounted only once, hence
# bind.
mkdir -p "/root$OUT"
mount --bind /out "/root$OUT" || die "cannot mount the run's folder at its path"
exec switch_root /root /bin/sh "$OUT/guest.sh" < /dev/console > /dev/console 2>&1
