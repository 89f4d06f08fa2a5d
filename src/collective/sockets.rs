//! Ranks over stream sockets: pairs that `--gpus` hands to the processes it starts, or TCP between processes
//! of torchrun and srun. Bytes are plain: a network that is not trusted needs a tunnel.

use std::fs::File;
use std::io::{self, ErrorKind as Kind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use super::{DEADLINE, Ranks, World, late};
use crate::error;

/// Longest wait in the system before the deadline is looked at.
const LOOK: Duration = Duration::from_millis(200);
/// Time that a stranger who connects has to say who it is.
const HELLO_TIME: Duration = Duration::from_secs(5);
const MAGIC: u64 = u64::from_le_bytes(*b"laamrank");
/// Calls, as they are numbered in a message.
const CALLS: [&str; 3] = ["all_to_all", "all_gather", "broadcast"];
/// Bytes before a message: call, its number, its bytes.
const HEADER_BYTES: usize = 24;
/// Bytes by which a process is known among those of one host.
const HOST_BYTES: usize = 128;

/// A rank that has a stream to every other one.
pub struct SocketRanks {
    world: World,
    /// By rank; none to itself.
    peers: Vec<Option<File>>,
    calls: u64,
    deadline: Duration,
}

/// A message under way to a rank, or from it.
#[derive(Default)]
struct SocketMessage {
    header: [u8; HEADER_BYTES],
    done: usize,
}

impl SocketMessage {
    fn is_over(&self, payload: usize) -> bool {
        self.done == HEADER_BYTES + payload
    }
}

impl SocketRanks {
    /// The rank with a stream to each other rank, in their order; the element of the rank itself is ignored.
    fn new(rank: usize, peers: Vec<Option<OwnedFd>>, deadline: Duration) -> anyhow::Result<Self> {
        let size = peers.len();
        let peers: Vec<Option<File>> = peers.into_iter().map(|fd| fd.map(File::from)).collect();
        for peer in peers.iter().flatten() {
            let fd = peer.as_raw_fd();
            // SAFETY: the descriptor is open; the calls set flags of it.
            unsafe {
                libc::fcntl(fd, libc::F_SETFL, libc::O_NONBLOCK);
                libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC);
            }
        }
        let library = "sockets".to_string();
        let world = World { rank, size, local_rank: rank, local_size: size, library };
        let mut ranks = Self { world, peers, calls: 0, deadline };
        let own = host();
        let mut all = vec![0; HOST_BYTES * size];
        ranks.all_gather(&own, &mut all)?;
        let here = |rank: &usize| all[rank * HOST_BYTES..][..HOST_BYTES] == own;
        ranks.world.local_rank = (0..rank).filter(here).count();
        ranks.world.local_size = (0..size).filter(here).count();
        Ok(ranks)
    }

    /// The rank of a process that [`pairs`] were made for.
    ///
    /// # Errors
    /// Descriptors that are no sockets, or a rank that does not answer.
    pub fn inherited(rank: usize, descriptors: &[Option<RawFd>]) -> anyhow::Result<Self> {
        // A rank whose launcher is gone ends.
        // SAFETY: the call sets an attribute of this process and takes no pointers.
        #[cfg(target_os = "linux")]
        unsafe {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        }
        let mut peers = Vec::new();
        for descriptor in descriptors {
            let Some(fd) = *descriptor else {
                peers.push(None);
                continue;
            };
            // SAFETY: fstat writes one struct, and fails for a descriptor that is not open.
            let is_socket = unsafe {
                let mut stat: libc::stat = std::mem::zeroed();
                libc::fstat(fd, &raw mut stat) == 0 && stat.st_mode & libc::S_IFMT == libc::S_IFSOCK
            };
            if !is_socket {
                return Err(error::config(
                    format!("descriptor {fd} is not a socket of the process that --gpus started"),
                    "unset LAAM_RANK, LAAM_WORLD_SIZE and LAAM_SOCKETS",
                ));
            }
            // SAFETY: the descriptor is open, and was handed to this process alone.
            peers.push(Some(unsafe { OwnedFd::from_raw_fd(fd) }));
        }
        Self::new(rank, peers, DEADLINE)
    }

    /// Meets the other ranks: rank 0 listens at `meeting`, and tells each where the others do.
    ///
    /// # Errors
    /// A rank that does not come before the deadline.
    pub fn meet(
        rank: usize,
        size: usize,
        meeting: &MeetingPoint,
        deadline: Duration,
    ) -> anyhow::Result<Self> {
        let failed = |what: &str, why: &io::Error| {
            let MeetingPoint { host, port, .. } = meeting;
            error::group(
                format!("{what} {host}:{port}: {why}"),
                "check that the address of rank 0 can be reached and the port is free; `rank_timeout` \
                 sets how long a rank waits",
            )
        };
        let end = Instant::now() + deadline;
        let mut streams: Vec<Option<TcpStream>> = (0..size).map(|_| None).collect();
        let any = if meeting.is_local { Ipv4Addr::LOCALHOST } else { Ipv4Addr::UNSPECIFIED };
        let listener = listen((any, if rank == 0 { meeting.port } else { 0 }).into())
            .map_err(|why| failed("cannot listen for", &why))?;
        if rank == 0 {
            let mut table = vec![0; 18 * size];
            for _ in 1..size {
                let (peer, port, stream) = accept(&listener, meeting.token, size, end)
                    .map_err(|why| failed("no other rank came to", &why))?;
                let from = stream.peer_addr().map_err(|why| failed("lost a rank at", &why))?;
                let place = &mut table[18 * peer..][..18];
                place[..16].copy_from_slice(&v6(from.ip()).octets());
                place[16..].copy_from_slice(&port.to_le_bytes());
                streams[peer] = Some(stream);
            }
            for mut stream in streams.iter().flatten() {
                stream.write_all(&table).map_err(|why| failed("lost a rank at", &why))?;
            }
        } else {
            let own =
                listener.local_addr().map_err(|why| failed("cannot listen for", &why))?.port();
            let hello = hello(meeting.token, rank, size, own);
            let first = || -> io::Result<(TcpStream, Vec<u8>)> {
                let mut stream = meeting.connect(end)?;
                stream.write_all(&hello)?;
                stream.set_read_timeout(Some(left(end)?))?;
                let mut table = vec![0; 18 * size];
                match stream.read_exact(&mut table) {
                    Ok(()) => Ok((stream, table)),
                    // How a read that waited too long ends.
                    Err(why) if why.kind() == Kind::WouldBlock => Err(Kind::TimedOut.into()),
                    Err(why) => Err(why),
                }
            };
            let (stream, table) = first().map_err(|why| failed("cannot reach rank 0 at", &why))?;
            streams[0] = Some(stream);
            for peer in 1..rank {
                let place = &table[18 * peer..][..18];
                let ip: [u8; 16] = place[..16].try_into().expect("16 bytes");
                let ip = Ipv6Addr::from(ip).to_canonical();
                let port = u16::from_le_bytes([place[16], place[17]]);
                let there = SocketAddr::new(ip, port);
                let reach = || {
                    let mut stream = TcpStream::connect_timeout(&there, left(end)?)?;
                    stream.write_all(&hello)?;
                    Ok(stream)
                };
                let reached =
                    reach().map_err(|why| failed(&format!("cannot reach rank {peer} of"), &why));
                streams[peer] = Some(reached?);
            }
            for _ in rank + 1..size {
                let (peer, _, stream) = accept(&listener, meeting.token, size, end)
                    .map_err(|why| failed("no other rank came after", &why))?;
                streams[peer] = Some(stream);
            }
        }
        for stream in streams.iter().flatten() {
            let set = stream.set_nodelay(true).and_then(|()| stream.set_read_timeout(None));
            set.map_err(|why| failed("lost a rank of", &why))?;
        }
        Self::new(rank, streams.into_iter().map(|it| it.map(OwnedFd::from)).collect(), deadline)
    }

    /// Sends `from(rank)` to every other rank while `into(rank)` comes from it. `bytes` of the call, and the
    /// call itself, must be the same everywhere.
    fn exchange<'a>(
        &mut self,
        call: usize,
        bytes: usize,
        from: impl Fn(usize) -> &'a [u8],
        mut into: Vec<&mut [u8]>,
    ) -> anyhow::Result<()> {
        self.calls += 1;
        let number = self.calls;
        let words = [call as u64, number, bytes as u64];
        let header: [u8; HEADER_BYTES] = bytemuck::cast(words.map(u64::to_le));
        let size = self.world.size;
        let mut sent: Vec<SocketMessage> =
            (0..size).map(|_| SocketMessage { header, done: 0 }).collect();
        let mut come: Vec<SocketMessage> = (0..size).map(|_| SocketMessage::default()).collect();
        let begin = Instant::now();
        loop {
            let mut waits = Vec::new();
            for (rank, peer) in self.peers.iter().enumerate() {
                let Some(peer) = peer else { continue };
                let reads = !come[rank].is_over(into[rank].len());
                let writes = !sent[rank].is_over(from(rank).len());
                let events =
                    if reads { libc::POLLIN } else { 0 } | if writes { libc::POLLOUT } else { 0 };
                if events != 0 {
                    let entry = libc::pollfd { fd: peer.as_raw_fd(), events, revents: 0 };
                    waits.push((rank, entry));
                }
            }
            if waits.is_empty() {
                return Ok(());
            }
            let mut polled: Vec<libc::pollfd> = waits.iter().map(|(_, entry)| *entry).collect();
            let left = self.deadline.saturating_sub(begin.elapsed());
            if left.is_zero() {
                let who = format!("rank {}, which did not come", waits[0].0);
                return Err(late(&self.world, self.deadline, CALLS[call], number, &who));
            }
            let milliseconds = left.min(LOOK).as_millis().max(1) as libc::c_int;
            // SAFETY: the array has as many entries as the call is told, and outlives it.
            unsafe {
                libc::poll(polled.as_mut_ptr(), polled.len() as libc::nfds_t, milliseconds);
            }
            for ((rank, _), entry) in waits.into_iter().zip(polled) {
                let peer = self.peers[rank].as_ref().expect("it was polled");
                let lost = |why: &io::Error| {
                    error::group(
                        format!(
                            "rank {} lost rank {rank} in {} (call {number}): {why}",
                            self.world.rank, CALLS[call]
                        ),
                        "see what that rank said; `resume` continues from the last checkpoint",
                    )
                };
                if entry.revents & !libc::POLLOUT != 0 {
                    receive(peer, &mut come[rank], into[rank]).map_err(|why| lost(&why))?;
                    if come[rank].done >= HEADER_BYTES && come[rank].header != header {
                        return Err(self.other_call(rank, &come[rank].header, words));
                    }
                }
                if entry.revents & libc::POLLOUT != 0 {
                    send(peer, &mut sent[rank], from(rank)).map_err(|why| lost(&why))?;
                }
            }
        }
    }

    /// The error of a rank that is in another call.
    fn other_call(&self, rank: usize, header: &[u8; HEADER_BYTES], own: [u64; 3]) -> anyhow::Error {
        let theirs: [u64; 3] = bytemuck::cast(*header);
        let say = |[call, number, bytes]: [u64; 3]| {
            let name = CALLS.get(call as usize).unwrap_or(&"an unknown call");
            format!("{name} (call {number}) of {bytes} bytes")
        };
        error::group(
            format!(
                "rank {} is in {}, rank {rank} in {}",
                self.world.rank,
                say(own),
                say(theirs.map(u64::from_le))
            ),
            error::INTERNAL,
        )
    }
}

/// Reads what has come of a message.
fn receive(mut peer: &File, message: &mut SocketMessage, into: &mut [u8]) -> io::Result<()> {
    loop {
        let rest = if message.done < HEADER_BYTES {
            &mut message.header[message.done..]
        } else {
            &mut into[message.done - HEADER_BYTES..]
        };
        if rest.is_empty() {
            return Ok(());
        }
        match peer.read(rest) {
            Ok(0) => return Err(io::Error::new(Kind::UnexpectedEof, "it ended")),
            Ok(count) => message.done += count,
            Err(why) if why.kind() == Kind::WouldBlock => return Ok(()),
            Err(why) if why.kind() == Kind::Interrupted => {}
            Err(why) => return Err(why),
        }
    }
}

/// Sends as much of a message as the system takes.
fn send(mut peer: &File, message: &mut SocketMessage, from: &[u8]) -> io::Result<()> {
    loop {
        let rest = if message.done < HEADER_BYTES {
            &message.header[message.done..]
        } else {
            &from[message.done - HEADER_BYTES..]
        };
        if rest.is_empty() {
            return Ok(());
        }
        match peer.write(rest) {
            Ok(count) => message.done += count,
            Err(why) if why.kind() == Kind::WouldBlock => return Ok(()),
            Err(why) if why.kind() == Kind::Interrupted => {}
            Err(why) => return Err(why),
        }
    }
}

/// Where the ranks of a run meet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MeetingPoint {
    /// Name or address of the host of rank 0.
    pub host: String,
    /// Port that rank 0 listens at.
    pub port: u16,
    /// All ranks are on one host: nobody else can connect.
    pub is_local: bool,
    /// Number of the run: ranks of others are turned away.
    pub token: u64,
}

impl MeetingPoint {
    /// A connection to rank 0, which may not be listening yet.
    fn connect(&self, end: Instant) -> io::Result<TcpStream> {
        let host = if self.is_local { "127.0.0.1" } else { &self.host };
        loop {
            let mut failed = io::Error::new(Kind::NotFound, "the name has no address");
            for there in (host, self.port).to_socket_addrs()? {
                match TcpStream::connect_timeout(&there, left(end)?) {
                    // It was given the port that it connects to, where nobody listens (RFC 9293, 3.5).
                    Ok(stream) if stream.local_addr()? == stream.peer_addr()? => {
                        reset(&stream)?;
                        failed = Kind::ConnectionRefused.into();
                    }
                    Ok(stream) => return Ok(stream),
                    Err(why) => failed = why,
                }
            }
            if Instant::now() + LOOK >= end {
                return Err(failed);
            }
            thread::sleep(Duration::from_millis(50));
        }
    }
}

/// Listens at an address, which a rank that looks for rank 0 there may hold for a moment.
fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let end = Instant::now() + LOOK;
    loop {
        match TcpListener::bind(address) {
            Err(why) if why.kind() == Kind::AddrInUse && Instant::now() < end => {
                thread::sleep(Duration::from_millis(5));
            }
            done => return done,
        }
    }
}

/// Lets a stream free its port at once when it is closed.
fn reset(stream: &TcpStream) -> io::Result<()> {
    let linger = libc::linger { l_onoff: 1, l_linger: 0 };
    let bytes = size_of_val(&linger) as libc::socklen_t;
    let fd = stream.as_raw_fd();
    // SAFETY: the descriptor is open, and `bytes` is the length of what the pointer points to.
    let set = unsafe {
        let (level, name) = (libc::SOL_SOCKET, libc::SO_LINGER);
        libc::setsockopt(fd, level, name, (&raw const linger).cast(), bytes)
    };
    if set == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Time until the end; an error if there is none.
fn left(end: Instant) -> io::Result<Duration> {
    let left = end.saturating_duration_since(Instant::now());
    if left.is_zero() { Err(Kind::TimedOut.into()) } else { Ok(left) }
}

/// What a process says first: who it is, and where it listens.
fn hello(token: u64, rank: usize, size: usize, port: u16) -> [u8; 32] {
    let words = [MAGIC, token, (rank as u64) << 32 | size as u64, u64::from(port)];
    bytemuck::cast(words.map(u64::to_le))
}

/// The next rank of the run that connects: its number, the port it listens at, and the stream.
fn accept(
    listener: &TcpListener,
    token: u64,
    size: usize,
    end: Instant,
) -> io::Result<(usize, u16, TcpStream)> {
    listener.set_nonblocking(true)?;
    loop {
        let mut stream = match listener.accept() {
            Ok((stream, _)) => stream,
            Err(why) if why.kind() == Kind::WouldBlock => {
                left(end)?;
                thread::sleep(Duration::from_millis(5));
                continue;
            }
            Err(why) => return Err(why),
        };
        stream.set_nonblocking(false)?;
        stream.set_read_timeout(Some(HELLO_TIME))?;
        let mut bytes = [0; 32];
        if stream.read_exact(&mut bytes).is_err() {
            continue;
        }
        let words: [u64; 4] = bytemuck::cast(bytes);
        let [magic, theirs, place, port] = words.map(u64::from_le);
        let (rank, of) = (place >> 32, place & u64::from(u32::MAX));
        if magic == MAGIC && theirs == token && of == size as u64 && rank < of {
            return Ok((rank as usize, port as u16, stream));
        }
    }
}

fn v6(ip: IpAddr) -> Ipv6Addr {
    match ip {
        IpAddr::V4(ip) => ip.to_ipv6_mapped(),
        IpAddr::V6(ip) => ip,
    }
}

/// What this host differs from every other one by.
fn host() -> Vec<u8> {
    let read = |path: &str| crate::files::read_text(path.as_ref(), 4096).unwrap_or_default();
    let mut bytes = read("/proc/sys/kernel/random/boot_id").into_bytes();
    bytes.extend(read("/proc/sys/kernel/hostname").into_bytes());
    bytes.resize(HOST_BYTES, 0);
    bytes
}

/// A stream between every two of so many ranks: element `j` of element `i` is rank `i`'s to rank `j`. They
/// are inherited by processes that are started.
pub fn pairs(size: usize) -> io::Result<Vec<Vec<Option<OwnedFd>>>> {
    let mut all: Vec<Vec<Option<OwnedFd>>> =
        (0..size).map(|_| (0..size).map(|_| None).collect()).collect();
    for other in 1..size {
        let (before, from_here) = all.split_at_mut(other);
        for (one, streams) in before.iter_mut().enumerate() {
            let (here, there) = UnixStream::pair()?;
            streams[other] = Some(here.into());
            from_here[0][one] = Some(there.into());
        }
    }
    Ok(all)
}

impl Ranks for SocketRanks {
    fn world(&self) -> &World {
        &self.world
    }

    fn all_to_all(&mut self, from: &[u8], into: &mut [u8]) -> anyhow::Result<()> {
        assert_eq!(from.len(), into.len(), "as many bytes come as go");
        let (rank, piece) = (self.world.rank, from.len() / self.world.size);
        let part = |peer: usize| &from[peer * piece..(peer + 1) * piece];
        into[rank * piece..(rank + 1) * piece].copy_from_slice(part(rank));
        let into = pieces(into, piece, self.world.size);
        self.exchange(0, piece, part, into)
    }

    fn all_gather(&mut self, mine: &[u8], all: &mut [u8]) -> anyhow::Result<()> {
        assert_eq!(all.len(), mine.len() * self.world.size, "a piece from every rank");
        let piece = mine.len();
        all[self.world.rank * piece..][..piece].copy_from_slice(mine);
        let into = pieces(all, piece, self.world.size);
        self.exchange(1, piece, |_| mine, into)
    }

    fn broadcast(&mut self, bytes: &mut [u8]) -> anyhow::Result<()> {
        let count = bytes.len();
        let mut into: Vec<&mut [u8]> = (0..self.world.size).map(|_| &mut [][..]).collect();
        if self.world.rank == 0 {
            return self.exchange(2, count, |_| bytes, into);
        }
        into[0] = bytes;
        self.exchange(2, count, |_| &[], into)
    }

    fn set_deadline(&mut self, deadline: Duration) {
        self.deadline = deadline;
    }

    fn lost(&mut self) -> Option<usize> {
        let events = libc::POLLRDHUP;
        let of = |peer: &File| libc::pollfd { fd: peer.as_raw_fd(), events, revents: 0 };
        let is_gone = |peer: &Option<File>| {
            let mut entry = peer.as_ref().map(of);
            entry.as_mut().is_some_and(|entry| {
                // SAFETY: the call is told of the one entry, which outlives it.
                unsafe { libc::poll(entry, 1, 0) > 0 && entry.revents != 0 }
            })
        };
        self.peers.iter().position(is_gone)
    }

    fn abort(&mut self, code: i32) -> ! {
        // The others see that the streams end.
        std::process::exit(code)
    }
}

/// The buffer as so many pieces.
fn pieces(all: &mut [u8], piece: usize, size: usize) -> Vec<&mut [u8]> {
    if piece == 0 {
        return (0..size).map(|_| &mut [][..]).collect();
    }
    all.chunks_exact_mut(piece).collect()
}
