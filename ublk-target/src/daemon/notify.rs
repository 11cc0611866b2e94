//! Reports the state of the daemon to systemd, if systemd has set `NOTIFY_SOCKET` (sd_notify(3)).

use std::ffi::OsStr;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

use crate::clock;

/// Sends `state`, for example `READY=1`. Without a socket, or if the send fails, it is dropped.
pub fn tell(state: &str) {
    if let Some(path) = std::env::var_os("NOTIFY_SOCKET") {
        let _ = send(&path, state);
    }
}

/// Reports the start of a reload. `READY=1` must follow at its end.
pub fn reloading() {
    tell(&format!("RELOADING=1\nMONOTONIC_USEC={}", clock::now().as_nanos() / 1000));
}

/// Interval between two `WATCHDOG=1`: half of the timeout in `WATCHDOG_USEC`. `None` if systemd expects
/// none from this process: no timeout is set, or `WATCHDOG_PID` names a different process.
pub fn watchdog() -> Option<Duration> {
    let number = |name: &str| std::env::var(name).ok()?.parse::<u64>().ok();
    let is_ours = number("WATCHDOG_PID").is_none_or(|pid| pid == u64::from(std::process::id()));
    number("WATCHDOG_USEC").filter(|usec| is_ours && *usec > 0).map(|usec| Duration::from_micros(usec.div_ceil(2)))
}

fn send(path: &OsStr, state: &str) -> std::io::Result<()> {
    let address = match path.as_bytes() {
        // A leading `@` marks a name in the abstract namespace.
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
        _ => SocketAddr::from_pathname(path)?,
    };
    let socket = UnixDatagram::unbound()?;
    // The control thread never blocks: if the queue of systemd is full, the message is dropped.
    socket.set_nonblocking(true)?;
    socket.send_to_addr(state.as_bytes(), &address).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_arrives_at_a_path_and_at_an_abstract_name() {
        let path = std::env::temp_dir().join(format!("ublk-throttle-notify-{}", std::process::id()));
        let by_path = UnixDatagram::bind(&path).unwrap();
        let name = format!("ublk-throttle-notify-{}", std::process::id());
        let by_name = UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap();
        send(path.as_os_str(), "READY=1").unwrap();
        send(OsStr::new(&format!("@{name}")), "READY=1").unwrap();
        std::fs::remove_file(&path).unwrap();
        for listener in [by_path, by_name] {
            let mut heard = [0; 16];
            let count = listener.recv(&mut heard).unwrap();
            assert_eq!(&heard[..count], b"READY=1");
        }
    }
}
