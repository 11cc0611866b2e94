# Prepares the guest for the command; part of both kinds of guest.
mkdir -p /lib/modules /run/vm
# ublks_max: by default the driver allows 64 devices (from Linux 6.15 on, 64 of unprivileged users),
# too few for a test of many devices.
modprobe ublk_drv ublks_max=4096 || echo "guest: no ublk_drv in $(uname -r)" > /dev/kmsg
mount -t debugfs debugfs /sys/kernel/debug 2> /dev/null

# The kernel patches its own code (static keys). For a moment an emulated processor may still
# execute the trap that guards the patch, and the kernel dies of it ("Oops: int3" in
# kmem_cache_alloc, when systemd made the first control group with memory). Make such a group once
# while a single processor is online; its static key stays enabled after the group is removed.
others=$(ls -d /sys/devices/system/cpu/cpu[1-9]* 2> /dev/null)
for cpu in $others; do echo 0 > "$cpu/online"; done
mkdir -p /run/vm/cgroup
if mount -t cgroup2 cgroup2 /run/vm/cgroup; then
    echo +memory > /run/vm/cgroup/cgroup.subtree_control && mkdir /run/vm/cgroup/first && rmdir /run/vm/cgroup/first
    echo -memory > /run/vm/cgroup/cgroup.subtree_control
    umount /run/vm/cgroup
fi
for cpu in $others; do echo 1 > "$cpu/online"; done
