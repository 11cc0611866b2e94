//! Exports of a disk by the kernel: nvmet (NVMe over fabrics) and LIO (SCSI).
//!
//! Both open the disk inside the kernel, so no process has it open.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::disks::{configfs, run};

/// An exported disk; the export ends on drop. No port or target leads to it: the export opens the
/// disk without them.
#[derive(Debug)]
pub struct Export {
    /// The folders in configfs, the innermost first.
    folders: Vec<PathBuf>,
    /// The file that ends the export with a 0, if there is one. LIO ends it with its folder.
    switch: Option<PathBuf>,
}

impl Export {
    /// Namespace 1 of a subsystem of nvmet.
    pub fn nvmet(subsystem: &str, node: &Path) -> Result<Self> {
        run("modprobe", &["nvmet"])?;
        let subsystem = configfs("nvmet")?.join("subsystems").join(subsystem);
        let namespace = subsystem.join("namespaces/1");
        let mut export = Self { folders: Vec::new(), switch: None };
        export.make(&subsystem)?;
        export.make(&namespace)?;
        write(&namespace.join("device_path"), node.as_os_str().as_encoded_bytes())?;
        write(&namespace.join("enable"), b"1")?;
        export.switch = Some(namespace.join("enable"));
        Ok(export)
    }

    /// A backend of LIO, below its first adapter for block devices (`iblock_0`).
    pub fn lio(name: &str, node: &Path) -> Result<Self> {
        run("modprobe", &["target_core_iblock"])?;
        let adapter = configfs("target")?.join("core/iblock_0");
        let backend = adapter.join(name);
        let mut export = Self { folders: Vec::new(), switch: None };
        export.make(&adapter)?;
        export.make(&backend)?;
        // `targetcli` writes both: the first is for readers, the second for the driver.
        write(&backend.join("udev_path"), node.as_os_str().as_encoded_bytes())?;
        write(&backend.join("control"), format!("udev_path={}", node.display()).as_bytes())?;
        write(&backend.join("enable"), b"1")?;
        Ok(export)
    }

    fn make(&mut self, folder: &Path) -> Result<()> {
        fs::create_dir(folder).with_context(|| folder.display().to_string())?;
        self.folders.insert(0, folder.to_owned());
        Ok(())
    }
}

impl Drop for Export {
    fn drop(&mut self) {
        if let Some(switch) = &self.switch {
            let _ = fs::write(switch, "0");
        }
        for folder in &self.folders {
            let _ = fs::remove_dir(folder);
        }
    }
}

fn write(path: &Path, value: &[u8]) -> Result<()> {
    fs::write(path, value).with_context(|| path.display().to_string())
}
