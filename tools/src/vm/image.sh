#!/usr/bin/busybox sh
# Init program of a guest with all files in its memory: mounts the kernel's file systems, then runs
# run-files/guest.sh.
#
#   ttyS0 console    ttyS1 output of the command    ttyS2 kernel log, at the end    ttyS3 exit status, written last
#
# A serial port accepts a byte in the instruction that writes it. A virtio port accepts it when the
# host is ready, and signals that by an interrupt at a different instant in each run.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin

# The root of an initramfs cannot be changed (pivot_root), but a mount of the same files over it can.
busybox mount --bind / /mnt
cd /mnt
busybox mount --move . /
exec busybox chroot . /usr/bin/busybox sh -c '
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/shm /dev/pts
mount -t tmpfs -o mode=1777 shm /dev/shm
mount -t devpts -o gid=5,mode=620,ptmxmode=666 devpts /dev/pts
mount -t tmpfs -o mode=755 run /run
# A workspace below /tmp would be hidden by the tmpfs: copy its files into it first.
mkdir -p /mnt/tmp
mount -t tmpfs -o mode=1777,size=75% tmp /mnt/tmp
cp -a /tmp/. /mnt/tmp/
mount --move /mnt/tmp /tmp
rmdir /mnt/tmp
ln -sfn /proc/self/fd /dev/fd
ln -sfn /proc/self/fd/0 /dev/stdin
ln -sfn /proc/self/fd/1 /dev/stdout
ln -sfn /proc/self/fd/2 /dev/stderr
busybox ip link set lo up
for port in 0 1 2 3; do stty -F /dev/ttyS$port raw -echo; done
cd / && exec /bin/sh /run-files/guest.sh < /dev/console > /dev/console 2>&1
'
