# Second half of the start of a guest whose files are all in its memory; then the command; then its status; then the end.
# Before this text stand, written for this run: FOLDER, the exported environment, and prepare.sh.
export LANG=C.UTF-8
mkdir -p "$FOLDER" && cd "$FOLDER" || cd /

mkfifo /run/vm/output
cat < /run/vm/output > /dev/ttyS1 & output=$!
echo "guest: command starts" > /dev/kmsg
setsid -w /bin/sh /run-files/command.sh < /dev/null > /run/vm/output 2>&1
status=$?
# Normally at once: the pipe ends with the command. A program left behind holds it for ever.
patience=100
while kill -0 $output 2> /dev/null && [ $patience -gt 0 ]; do
    sleep 0.1
    patience=$((patience - 1))
done
[ $patience -gt 0 ] || echo "guest: programs that the command left behind hold its output; its end may be missing" > /dev/ttyS1

dmesg > /dev/ttyS2
echo "$status" > /dev/ttyS3
# A reset, which -no-reboot makes the end; see guest.sh.
echo b > /proc/sysrq-trigger
sleep 60
