# Second part of the start of a guest with all files in its memory: runs the command, writes its
# status, resets. Prepended for each run: FOLDER, the exported environment, and prepare.sh.
export LANG=C.UTF-8
mkdir -p "$FOLDER" && cd "$FOLDER" || cd /

mkfifo /run/vm/output
cat < /run/vm/output > /dev/ttyS1 & output=$!
echo "guest: command starts" > /dev/kmsg
setsid -w /bin/sh /run-files/command.sh < /dev/null > /run/vm/output 2>&1
status=$?
# Normally the pipe ends with the command. A program left behind holds it for ever: wait 10 s at
# most.
patience=100
while kill -0 $output 2> /dev/null && [ $patience -gt 0 ]; do
    sleep 0.1
    patience=$((patience - 1))
done
[ $patience -gt 0 ] || echo "guest: programs that the command left behind hold its output; its end may be missing" > /dev/ttyS1

dmesg > /dev/ttyS2
echo "$status" > /dev/ttyS3
# A reset, which -no-reboot turns into the end of QEMU; see guest.sh.
echo b > /proc/sysrq-trigger
sleep 60
