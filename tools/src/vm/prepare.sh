# What every command finds in the guest, wherever its files are.
mkdir -p /lib/modules /run/vm
# More ids than the kernel's 64 for unprivileged users; by default devices would run out in a test of many.
modprobe ublk_drv ublks_max=4096 || echo "guest: no ublk_drv in $(uname -r)" > /dev/kmsg
mount -t debugfs debugfs /sys/kernel/debug 2> /dev/null

# The kernel rewrites its own code (static keys); an emulated processor may still run what stood there for a moment, the trap that
# guards the rewriting, and the kernel dies of it: "Oops: int3" in kmem_cache_alloc, when systemd made the first control group with
# memory. So that is done once while there is one processor. The key stays as it is when the group has gone.
others=$(ls -d /sys/devices/system/cpu/cpu[1-9]* 2> /dev/null)
for cpu in $others; do echo 0 > "$cpu/online"; done
mkdir -p /run/vm/cgroup
if mount -t cgroup2 cgroup2 /run/vm/cgroup; then
    echo +memory > /run/vm/cgroup/cgroup.subtree_control && mkdir /run/vm/cgroup/first && rmdir /run/vm/cgroup/first
    echo -memory > /run/vm/cgroup/cgroup.subtree_control
    umount /run/vm/cgroup
fi
for cpu in $others; do echo 1 > "$cpu/online"; done
