//! MPI by `dlopen`: nothing is linked, and one binary works with Open MPI 4 and 5, with MPICH and what shares
//! its binary interface, and with the standard interface of MPI 5.
//!
//! Only bytes are moved. Collectives are non-blocking and polled, because a blocking one cannot be left when
//! a rank does not come.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};
use std::{env, fs, ptr, thread};

use super::{DEADLINE, GROUP_EXIT_CODE, Ranks, World, late};
use crate::error;

/// Time that a launcher has to forward an error before the run is aborted.
const FORWARDING_TIME: Duration = Duration::from_secs(1);

/// Libraries that a launcher belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MpiFamily {
    /// Open MPI 4 and 5.
    OpenMpi,
    /// MPICH, Intel MPI, MVAPICH, Cray MPICH; the standard interface.
    Mpich,
}

impl MpiFamily {
    /// File names of its libraries.
    fn names(self) -> &'static [&'static str] {
        match self {
            Self::OpenMpi => &["libmpi.so.40"],
            Self::Mpich => {
                &["libmpi.so.12", "libmpich.so.12", "libmpi_abi.so.1", "libmpi_abi.so.0"]
            }
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::OpenMpi => "Open MPI",
            Self::Mpich => "MPICH",
        }
    }
}

/// A handle of any library: an address, or an int in the low half.
type Handle = usize;

/// Constants that libraries define differently.
struct Constants {
    family: MpiFamily,
    comm_world: Handle,
    byte: Handle,
    float: Handle,
    sum: Handle,
    in_place: usize,
    errors_return: Handle,
    info_null: Handle,
    status_ignore: usize,
    comm_type_shared: c_int,
    thread_serialized: c_int,
}

/// `MPI_SUCCESS` of every library.
const SUCCESS: c_int = 0;
/// Longest text that `MPI_Get_library_version` or `MPI_Error_string` of any library writes.
const MAX_TEXT_BYTES: usize = 8192;

macro_rules! functions {
    ($($field:ident: $symbol:literal, fn($($argument:ty),*);)*) => {
        /// The functions that are called, by their addresses.
        struct Functions {
            $($field: unsafe extern "C" fn($($argument),*) -> c_int,)*
        }

        impl Functions {
            /// Finds every function in a library that is loaded.
            fn find(library: &LoadedLibrary) -> Result<Self, &'static str> {
                Ok(Self {
                    $($field: {
                        let address = library.symbol($symbol).ok_or($symbol)?;
                        // SAFETY: the MPI standard gives the symbol this prototype; handles are ints or
                        // pointers, which are passed in registers of the same size.
                        unsafe {
                            std::mem::transmute::<
                                *mut c_void,
                                unsafe extern "C" fn($($argument),*) -> c_int,
                            >(address)
                        }
                    },)*
                })
            }
        }
    };
}

functions! {
    init_thread: "MPI_Init_thread", fn(*mut c_int, *mut c_void, c_int, *mut c_int);
    finalize: "MPI_Finalize", fn();
    abort: "MPI_Abort", fn(Handle, c_int);
    comm_rank: "MPI_Comm_rank", fn(Handle, *mut c_int);
    comm_size: "MPI_Comm_size", fn(Handle, *mut c_int);
    comm_split_type: "MPI_Comm_split_type", fn(Handle, c_int, c_int, Handle, *mut Handle);
    comm_set_errhandler: "MPI_Comm_set_errhandler", fn(Handle, Handle);
    get_library_version: "MPI_Get_library_version", fn(*mut c_char, *mut c_int);
    error_string: "MPI_Error_string", fn(c_int, *mut c_char, *mut c_int);
    ialltoall: "MPI_Ialltoall",
        fn(*const c_void, c_int, Handle, *mut c_void, c_int, Handle, Handle, *mut Handle);
    iallgather: "MPI_Iallgather",
        fn(*const c_void, c_int, Handle, *mut c_void, c_int, Handle, Handle, *mut Handle);
    ibcast: "MPI_Ibcast", fn(*mut c_void, c_int, Handle, c_int, Handle, *mut Handle);
    iallreduce: "MPI_Iallreduce",
        fn(usize, *mut c_void, c_int, Handle, Handle, Handle, *mut Handle);
    test: "MPI_Test", fn(*mut Handle, *mut c_int, usize);
}

/// A library that stays loaded.
struct LoadedLibrary {
    handle: *mut c_void,
    path: PathBuf,
}

impl LoadedLibrary {
    /// Loads a library by its path or name. `RTLD_GLOBAL` makes its symbols those of plugins that it loads
    /// itself.
    fn open(path: &Path, visibility: c_int) -> Option<Self> {
        let name = CString::new(path.as_os_str().as_encoded_bytes()).ok()?;
        // SAFETY: the name ends in a zero byte. The initializers of an MPI library are safe to run.
        let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | visibility) };
        (!handle.is_null()).then(|| Self { handle, path: path.to_path_buf() })
    }

    fn symbol(&self, name: &str) -> Option<*mut c_void> {
        let name = CString::new(name).ok()?;
        // SAFETY: the library is loaded and never unloaded, and the name ends in a zero byte.
        let address = unsafe { libc::dlsym(self.handle, name.as_ptr()) };
        (!address.is_null()).then_some(address)
    }

    /// The constants of the library's binary interface.
    fn constants(&self) -> Option<Constants> {
        let address = |name: &str| self.symbol(name).map(|address| address as Handle);
        if let Some(comm_world) = address("ompi_mpi_comm_world") {
            return Some(Constants {
                family: MpiFamily::OpenMpi,
                comm_world,
                byte: address("ompi_mpi_byte")?,
                float: address("ompi_mpi_float")?,
                sum: address("ompi_mpi_op_sum")?,
                in_place: 1,
                errors_return: address("ompi_mpi_errors_return")?,
                info_null: address("ompi_mpi_info_null")?,
                status_ignore: 0,
                comm_type_shared: 0,
                thread_serialized: 2,
            });
        }
        let file = self.path.file_name().unwrap_or_default().to_string_lossy();
        Some(if file.starts_with("libmpi_abi.") {
            Constants {
                family: MpiFamily::Mpich,
                comm_world: 0x101,
                byte: 0x247,
                float: 0x210,
                sum: 0x21,
                in_place: 1,
                errors_return: 0x143,
                info_null: 0x130,
                status_ignore: 0,
                comm_type_shared: 221,
                thread_serialized: 2048,
            }
        } else {
            Constants {
                family: MpiFamily::Mpich,
                comm_world: 0x4400_0000,
                byte: 0x4c00_010d,
                float: 0x4c00_040a,
                sum: 0x5800_0003,
                in_place: usize::MAX,
                errors_return: 0x5400_0001,
                info_null: 0x1c00_0000,
                status_ignore: 1,
                comm_type_shared: 1,
                thread_serialized: 2,
            }
        })
    }
}

/// Places of a family's libraries: what `LAAM_MPI` names, beside the launcher, where the loader looks,
/// Python environments. Never the current folder: loading a library runs its code.
fn places(family: MpiFamily) -> Vec<PathBuf> {
    if let Some(given) = env::var_os("LAAM_MPI").filter(|path| !path.is_empty()) {
        return vec![PathBuf::from(given)];
    }
    let below = |folder: PathBuf| family.names().iter().map(move |name| folder.join(name));
    let mut places: Vec<PathBuf> = launcher_folders().into_iter().flat_map(below).collect();
    places.extend(family.names().iter().map(PathBuf::from));
    let environments = ["VIRTUAL_ENV", "CONDA_PREFIX"].into_iter().filter_map(env::var_os);
    let environments = environments.map(PathBuf::from).filter(|folder| folder.is_absolute());
    places.extend(environments.flat_map(|folder| below(folder.join("lib"))));
    let search = env::var_os("PATH").unwrap_or_default();
    let beside = env::split_paths(&search)
        .filter(|folder| folder.is_absolute() && folder.join("mpiexec").is_file());
    places.extend(beside.filter_map(|folder| Some(folder.parent()?.join("lib"))).flat_map(below));
    places
}

/// Programs by which the launchers of MPI libraries start processes.
const LAUNCHERS: [&str; 7] =
    ["hydra_pmi_proxy", "mpiexec", "mpirun", "orted", "prted", "prterun", "pmi_proxy"];

/// The folders `lib` beside the launchers among the processes above this one.
fn launcher_folders() -> Vec<PathBuf> {
    let mut folders = Vec::new();
    let mut process = std::process::id();
    for _ in 0..4 {
        let stat = crate::files::read_text(Path::new(&format!("/proc/{process}/stat")), 4096);
        // After the name in parentheses: state, parent.
        let parent = stat.ok().and_then(|stat| {
            stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse::<u32>().ok()
        });
        let Some(parent) = parent.filter(|&parent| parent > 1) else { break };
        process = parent;
        let Ok(program) = fs::read_link(format!("/proc/{parent}/exe")) else { continue };
        let name = program.file_name().unwrap_or_default().to_string_lossy();
        let is_launcher = LAUNCHERS.iter().any(|known| name.split('.').next() == Some(known));
        if let (true, Some(prefix)) = (is_launcher, program.parent().and_then(Path::parent)) {
            folders.push(prefix.join("lib"));
        }
    }
    folders
}

/// An MPI library that was found, without starting it: its file, and what it says of itself.
pub fn find(family: MpiFamily) -> Option<(PathBuf, String)> {
    let open = |path: &PathBuf| LoadedLibrary::open(path, libc::RTLD_LOCAL);
    let library = places(family).iter().find_map(open)?;
    let functions = Functions::find(&library).ok()?;
    Some((library.path.clone(), functions.version()))
}

impl Functions {
    /// The library's name and version: `MPICH 5.0.2`. It may be asked before the library is started.
    fn version(&self) -> String {
        let mut text = vec![0 as c_char; MAX_TEXT_BYTES + 1];
        let mut length = 0;
        // SAFETY: the buffer is as long as any library writes, and ends in a zero byte.
        let text = unsafe {
            (self.get_library_version)(text.as_mut_ptr(), &raw mut length);
            CStr::from_ptr(text.as_ptr())
        };
        let text = text.to_string_lossy();
        let first = text.lines().next().unwrap_or_default();
        let words: Vec<&str> =
            first.split([' ', '\t', ':', ',']).filter(|word| !word.is_empty()).collect();
        match words.as_slice() {
            ["MPICH", "Version", version, ..] => format!("MPICH {version}"),
            ["Open", "MPI", version, ..] => format!("Open MPI {}", version.trim_start_matches('v')),
            _ => first.chars().take(60).collect(),
        }
    }
}

/// Makes a call that waits for other processes and cannot be left: after the deadline this process ends, and
/// its launcher ends the others.
fn within<T>(deadline: Duration, name: &str, call: impl FnOnce() -> T) -> T {
    let (done, waits) = mpsc::channel::<()>();
    let line = format!(
        "laam: waited {} s in {name} for a process that did not come\n",
        deadline.as_secs_f64()
    );
    thread::spawn(move || {
        if waits.recv_timeout(deadline) == Err(RecvTimeoutError::Timeout) {
            let _ = std::io::stderr().write_all(line.as_bytes());
            thread::sleep(FORWARDING_TIME);
            // SAFETY: the call ends the process, without the handlers of the library that waits.
            unsafe { libc::_exit(GROUP_EXIT_CODE) }
        }
    });
    let result = call();
    drop(done);
    result
}

/// A process among those that an MPI launcher started.
pub struct MpiRanks {
    functions: Functions,
    constants: Constants,
    world: World,
    deadline: Duration,
    calls: u64,
}

impl MpiRanks {
    /// Loads a library of the launcher's family, and starts it.
    ///
    /// # Errors
    /// No library, or one of another launcher. A process that does not come before the deadline ends this one.
    pub fn start(family: MpiFamily, deadline: Duration) -> anyhow::Result<Self> {
        let name = family.name();
        let open = |path: &PathBuf| LoadedLibrary::open(path, libc::RTLD_GLOBAL);
        let library = places(family).iter().find_map(open);
        let library = library.ok_or_else(|| {
            error::config(
                format!("started by an mpiexec of {name}, but none of its libraries was found"),
                "run scripts/setup-mpi and use .venv/bin/mpiexec, or name the library in LAAM_MPI",
            )
        })?;
        let path = library.path.display();
        let functions = Functions::find(&library).map_err(|symbol| {
            error::config(format!("{path} has no {symbol}"), "install MPICH or Open MPI 4 or newer")
        })?;
        let constants = library.constants().ok_or_else(|| {
            error::config(format!("{path} is of an unknown MPI"), "install MPICH or Open MPI 4")
        })?;
        if constants.family != family {
            return Err(error::config(
                format!("started by an mpiexec of {name}, but {path} is {}", functions.version()),
                "use the mpiexec of that library, or name another library in LAAM_MPI",
            ));
        }
        // A process whose launcher is gone would wait for ever, or train on alone.
        // SAFETY: the call sets an attribute of this process and takes no pointers.
        #[cfg(target_os = "linux")]
        unsafe {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        }
        let library = functions.version();
        let mut provided = 0;
        // SAFETY: MPI allows null for both arguments of main; `provided` outlives the call.
        let started = within(deadline, "MPI_Init", || unsafe {
            (functions.init_thread)(
                ptr::null_mut(),
                ptr::null_mut(),
                constants.thread_serialized,
                &raw mut provided,
            )
        });
        if started != SUCCESS {
            return Err(error::group(
                format!("{library} cannot start: error {started}"),
                "see what it said; start the processes by the mpiexec of this library",
            ));
        }
        let number = |comm: Handle, call: unsafe extern "C" fn(Handle, *mut c_int) -> c_int| {
            let mut value = 0;
            // SAFETY: the communicator is one of the library, which is started.
            unsafe { call(comm, &raw mut value) };
            value.max(0) as usize
        };
        let all = constants.comm_world;
        let mut here: Handle = 0;
        // SAFETY: as above; the pointer outlives the call.
        unsafe {
            (functions.comm_set_errhandler)(all, constants.errors_return);
            (functions.comm_split_type)(
                all,
                constants.comm_type_shared,
                0,
                constants.info_null,
                &raw mut here,
            );
        }
        let world = World {
            rank: number(all, functions.comm_rank),
            size: number(all, functions.comm_size),
            local_rank: number(here, functions.comm_rank),
            local_size: number(here, functions.comm_size),
            library,
        };
        Ok(Self { functions, constants, world, deadline: DEADLINE, calls: 0 })
    }

    /// Waits until a collective is complete.
    fn wait(&mut self, call: &str, started: c_int, mut request: Handle) -> anyhow::Result<()> {
        self.check(call, started)?;
        let begin = Instant::now();
        let mut looks = 0u32;
        loop {
            let mut complete = 0;
            // SAFETY: the request is that of the call just made, whose buffers the caller holds until this
            // returns; an error ends the process.
            let tested = unsafe {
                (self.functions.test)(
                    &raw mut request,
                    &raw mut complete,
                    self.constants.status_ignore,
                )
            };
            self.check(call, tested)?;
            if complete != 0 {
                return Ok(());
            }
            if begin.elapsed() >= self.deadline {
                let who = "a rank that did not come";
                return Err(late(&self.world, self.deadline, call, self.calls, who));
            }
            // Other ranks may need this processor.
            looks += 1;
            match looks {
                0..200 => thread::yield_now(),
                _ => thread::sleep(Duration::from_micros(100)),
            }
        }
    }

    fn check(&self, call: &str, code: c_int) -> anyhow::Result<()> {
        if code == SUCCESS {
            return Ok(());
        }
        let mut text = vec![0 as c_char; MAX_TEXT_BYTES + 1];
        let mut length = 0;
        // SAFETY: the buffer is as long as any library writes, and ends in a zero byte.
        let text = unsafe {
            (self.functions.error_string)(code, text.as_mut_ptr(), &raw mut length);
            CStr::from_ptr(text.as_ptr())
        };
        let why = text.to_string_lossy();
        let (rank, number) = (self.world.rank, self.calls);
        Err(error::group(
            format!("rank {rank}: {call} (call {number}) failed: {}", why.trim()),
            "see what the other ranks said; `resume` continues from the last checkpoint",
        ))
    }

    fn count(call: &str, bytes: usize) -> anyhow::Result<c_int> {
        c_int::try_from(bytes)
            .map_err(|_| error::internal(format!("{call} of {bytes} bytes per rank in one call")))
    }
}

impl Ranks for MpiRanks {
    fn world(&self) -> &World {
        &self.world
    }

    fn all_to_all(&mut self, from: &[u8], into: &mut [u8]) -> anyhow::Result<()> {
        assert_eq!(from.len(), into.len(), "as many bytes come as go");
        let count = Self::count("all_to_all", from.len() / self.world.size)?;
        self.calls += 1;
        let Constants { comm_world, byte, .. } = self.constants;
        let mut request: Handle = 0;
        // SAFETY: both buffers have `count` bytes per rank and live until the call is complete, or the
        // process ends.
        let started = unsafe {
            (self.functions.ialltoall)(
                from.as_ptr().cast(),
                count,
                byte,
                into.as_mut_ptr().cast(),
                count,
                byte,
                comm_world,
                &raw mut request,
            )
        };
        self.wait("all_to_all", started, request)
    }

    fn all_gather(&mut self, mine: &[u8], all: &mut [u8]) -> anyhow::Result<()> {
        assert_eq!(all.len(), mine.len() * self.world.size, "a piece from every rank");
        let count = Self::count("all_gather", mine.len())?;
        self.calls += 1;
        let Constants { comm_world, byte, .. } = self.constants;
        let mut request: Handle = 0;
        // SAFETY: `mine` has `count` bytes, `all` as many per rank, and both live until the call is
        // complete, or the process ends.
        let started = unsafe {
            (self.functions.iallgather)(
                mine.as_ptr().cast(),
                count,
                byte,
                all.as_mut_ptr().cast(),
                count,
                byte,
                comm_world,
                &raw mut request,
            )
        };
        self.wait("all_gather", started, request)
    }

    fn broadcast(&mut self, bytes: &mut [u8]) -> anyhow::Result<()> {
        let count = Self::count("broadcast", bytes.len())?;
        self.calls += 1;
        let Constants { comm_world, byte, .. } = self.constants;
        let mut request: Handle = 0;
        // SAFETY: the buffer has `count` bytes and lives until the call is complete, or the process ends.
        let started = unsafe {
            let bytes = bytes.as_mut_ptr().cast();
            (self.functions.ibcast)(bytes, count, byte, 0, comm_world, &raw mut request)
        };
        self.wait("broadcast", started, request)
    }

    fn native_all_reduce(&mut self, values: &mut [f32]) -> anyhow::Result<bool> {
        let count = Self::count("native_all_reduce", values.len())?;
        self.calls += 1;
        let Constants { comm_world, float, sum, in_place, .. } = self.constants;
        let mut request: Handle = 0;
        // SAFETY: the buffer has `count` values and lives until the call is complete, or the process ends.
        let started = unsafe {
            let values = values.as_mut_ptr().cast();
            (self.functions.iallreduce)(
                in_place,
                values,
                count,
                float,
                sum,
                comm_world,
                &raw mut request,
            )
        };
        self.wait("native_all_reduce", started, request)?;
        Ok(true)
    }

    fn set_deadline(&mut self, deadline: Duration) {
        self.deadline = deadline;
    }

    fn finish(&mut self) {
        // SAFETY: the library is started, and no call of it is under way.
        within(self.deadline, "MPI_Finalize", || unsafe { (self.functions.finalize)() });
    }

    fn abort(&mut self, code: i32) -> ! {
        // The launcher forwards stderr, and an abort may end it before it has read the error.
        thread::sleep(FORWARDING_TIME);
        // SAFETY: the library is started; it ends the process.
        unsafe { (self.functions.abort)(self.constants.comm_world, code) };
        std::process::exit(code)
    }
}

// SAFETY: the library is started for calls from any thread, one at a time (MPI_THREAD_SERIALIZED), and
// `&mut self` excludes concurrent calls.
unsafe impl Send for MpiRanks {}
