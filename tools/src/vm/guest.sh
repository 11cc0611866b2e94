# Second part of the guest's start, in the host's files: runs the command, writes its status, resets.
# Prepended for each run: OUT, FOLDER, the exported environment, and prepare.sh.
cd "$FOLDER" || cd /

if [ -e "$OUT/shell" ]; then
    # A controlling terminal, so that ^C and job control work.
    stty -F /dev/ttyS0 sane $(cat "$OUT/shell")
    # Without the user's rc file, which may start half a dozen programs: seconds under emulation.
    PS1="vm:\w# " setsid -c bash --norc -i < /dev/ttyS0 > /dev/ttyS0 2>&1
    status=$?
else
    # Output goes through pipes: a virtio port can be opened once only, so `echo > /dev/stderr` in
    # the command would fail.
    mkfifo /run/vm/stdout /run/vm/stderr
    cat < /run/vm/stdout > /dev/virtio-ports/stdout & stdout=$!
    cat < /run/vm/stderr > /dev/virtio-ports/stderr & stderr=$!
    echo "guest: command starts" > /dev/kmsg
    setsid -w /bin/sh "$OUT/command.sh" < /dev/null > /run/vm/stdout 2> /run/vm/stderr
    status=$?
    # Normally the pipes end with the command. A program left behind holds them for ever, and on a
    # busy host the last lines take seconds: wait at most 10 s, then report that lines may be
    # missing.
    patience=100
    while { kill -0 $stdout || kill -0 $stderr; } 2> /dev/null; do
        sleep 0.1
        patience=$((patience - 1))
        [ $patience -gt 0 ] || { : > "$OUT/cut"; break; }
    done
fi

dmesg > "$OUT/dmesg"
# Renamed when complete: the host kills the guest 5 s after it has seen this file (`LAST_MOMENT`).
echo "$status" > "$OUT/status.part"
mv "$OUT/status.part" "$OUT/status"
sync -f "$OUT"
# A reset, which -no-reboot turns into the end of QEMU. During a power-off the guest would be idle
# without a timer, and QEMU would warn about that.
echo b > /proc/sysrq-trigger
sleep 60
