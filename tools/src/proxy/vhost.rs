//! Sockets of vhost-user-blk: one in a folder for each disk on offer, there as long as it is.
//!
//! Whoever runs a guest connects to its disk's socket and describes the guest's memory and queues there. A thread of its
//! own reads these messages, for they are rare and come with descriptors; what each of them does happens on the data
//! thread ([`afterimage_dataplane::vhost::Server::command`]). A disk has one such connection at a time: the next one
//! waits in the socket's queue. Nothing of a guest is looked at before its disk is on offer, which it is only when its
//! lock has been obtained: a dead process has no I/O under way then.

use std::collections::HashMap;
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use afterimage_dataplane::host::{DiskKey, Export, Geometry};
use afterimage_dataplane::vhost::message::{self, Command, FDS_MAX, HEADER, Header};
use afterimage_dataplane::vhost::proto::protocol;
use afterimage_dataplane::vhost::{AttachError, DeviceId, Outcome, Reply};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
};
use tokio::net::UnixListener;
use tokio::sync::oneshot;

use super::runtime::{Core, Gone, Handle};
use super::state::Proxy;

/// What the socket of a disk is called after its name.
const SUFFIX: &str = ".sock";
/// `sun_path` holds 108 bytes with its final zero.
const PATH_MAX: usize = 107;
/// A look at what is on offer although nobody said that it has changed: as long as an export has no socket, whose reason may
/// go away by itself. Otherwise nobody is woken.
const LOOK: Duration = Duration::from_secs(60);
/// Pause after a listener failed (no descriptors left), so that it does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// First and longest pause before something is tried again that waits for requests to end.
const WAIT: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(50));

/// The socket of an export in this folder.
pub fn socket(dir: &Path, export: &str) -> PathBuf {
    // A slash would be a folder, a leading dot a hidden file or worse.
    let name: String = export.chars().map(|c| if c == '/' || c == '\0' { '-' } else { c }).collect();
    let name = if name.starts_with('.') { format!("-{name}") } else { name };
    dir.join(format!("{name}{SUFFIX}"))
}

/// How an operator finds it.
pub fn uri(dir: Option<&Path>, export: &str) -> Option<String> {
    dir.map(|dir| format!("vhost-user:{}", socket(dir, export).display()))
}

/// What a connection leaves for the task that follows the exports.
#[derive(Default)]
struct Live {
    device: Option<DeviceId>,
    stream: Option<UnixStream>,
    /// Where the other side hears of a change.
    notices: Option<UnixStream>,
    /// It knows of changes of the configuration space.
    config: bool,
}

type Shared = Arc<Mutex<Live>>;

fn lock(live: &Shared) -> std::sync::MutexGuard<'_, Live> {
    live.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A socket that listens.
struct Offer {
    key: DiskKey,
    geometry: Geometry,
    path: PathBuf,
    live: Shared,
    accepting: tokio::task::JoinHandle<()>,
}

impl Offer {
    /// Ends the connection, too: the disk has gone.
    fn close(&self) {
        if let Some(stream) = &lock(&self.live).stream {
            let _ = stream.shutdown(std::net::Shutdown::Both);
        }
    }
}

impl Drop for Offer {
    /// A connection stays: at a clean stop what is under way is answered first.
    fn drop(&mut self) {
        self.accepting.abort();
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Follows what a data thread has on offer, as long as that lives.
pub async fn follow<C: Core>(proxy: Rc<Proxy>, handle: Handle<C>, dir: PathBuf) -> Gone {
    let mut changes = proxy.offers.subscribe();
    let mut offers: HashMap<String, Offer> = HashMap::new();
    // Exports that cannot be offered, so that each is told of once.
    let mut refused: HashMap<String, String> = HashMap::new();
    loop {
        let exports = match handle.call(|desk| desk.core.exports()).await {
            Ok(exports) => exports,
            Err(gone) => return gone,
        };
        offers.retain(|name, offer| {
            let stays = exports.iter().any(|e| e.name == *name && e.key == offer.key);
            if !stays {
                offer.close();
            }
            stays
        });
        refused.retain(|name, _| exports.iter().any(|e| e.name == *name));
        for export in exports {
            if let Some(offer) = offers.get_mut(&export.name) {
                if offer.geometry != export.geometry {
                    offer.geometry = export.geometry.clone();
                    if refresh(&handle, &offer.live, export.geometry).await.is_err() {
                        return Gone;
                    }
                }
                continue;
            }
            match listen(&handle, &offers, &dir, &export) {
                Ok(offer) => {
                    refused.remove(&export.name);
                    tracing::info!(disk = export.name, path = %offer.path.display(), "vhost-user");
                    offers.insert(export.name, offer);
                }
                Err(why) => {
                    let why = why.to_string();
                    if refused.insert(export.name.clone(), why.clone()).as_ref() != Some(&why) {
                        tracing::warn!(disk = export.name, why, "no vhost-user socket for this disk");
                    }
                }
            }
        }
        if refused.is_empty() {
            let _ = changes.changed().await;
        } else {
            let _ = tokio::time::timeout(LOOK, changes.changed()).await;
        }
    }
}

fn listen<C: Core>(
    handle: &Handle<C>,
    offers: &HashMap<String, Offer>,
    dir: &Path,
    export: &Export,
) -> io::Result<Offer> {
    let path = socket(dir, &export.name);
    if let Some((other, _)) = offers.iter().find(|(_, offer)| offer.path == path) {
        return Err(io::Error::other(format!("its socket would be called like that of `{other}`")));
    }
    if path.as_os_str().len() > PATH_MAX {
        return Err(io::Error::other(format!("`{}` is longer than {PATH_MAX} bytes", path.display())));
    }
    super::keep::folder(dir)?;
    let listener = UnixListener::from_std(super::service::bind_unix(&path)?)?;
    let live = Shared::default();
    let accepting = tokio::task::spawn_local(accept(handle.clone(), listener, export.key, Arc::clone(&live)));
    Ok(Offer { key: export.key, geometry: export.geometry.clone(), path, live, accepting })
}

/// The disk is another now: its guest hears of it.
async fn refresh<C: Core>(handle: &Handle<C>, live: &Shared, geometry: Geometry) -> Result<(), Gone> {
    let Some(device) = lock(live).device else { return Ok(()) };
    let changed = handle.call(move |desk| desk.fronts.vhost.refresh(device, geometry)).await?;
    let mut live = lock(live);
    if changed
        && live.config
        && let Some(notices) = &mut live.notices
    {
        // Without waiting: who does not read its notices learns of it otherwise.
        let _ = notices.write(&message::notice(message::notice::CONFIG_CHANGE));
    }
    Ok(())
}

async fn accept<C: Core>(handle: Handle<C>, listener: UnixListener, key: DiskKey, live: Shared) {
    loop {
        let stream = match listener.accept().await.and_then(|(stream, _)| stream.into_std()) {
            Ok(stream) => stream,
            Err(error) => {
                tracing::warn!(%error, "cannot accept a vhost-user connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let (ended, end) = oneshot::channel::<()>();
        let session = Session { handle: handle.clone(), key, live: Arc::clone(&live), protocol: 0 };
        let thread = std::thread::Builder::new().name("vhost-user".to_owned()).spawn(move || {
            let _ended = ended;
            session.run(stream);
        });
        match thread {
            Ok(_) => drop(end.await),
            Err(error) => {
                tracing::warn!(%error, "no thread for a vhost-user connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// Why a connection ends.
#[derive(Debug, thiserror::Error)]
enum End {
    #[error("the other side has gone")]
    Closed,
    #[error("its disk is not on offer any more")]
    Gone,
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("{0}")]
    Refused(&'static str),
    #[error(transparent)]
    Attach(#[from] AttachError),
}

impl From<Gone> for End {
    fn from(_: Gone) -> Self {
        Self::Gone
    }
}

impl From<message::Refused> for End {
    fn from(refused: message::Refused) -> Self {
        Self::Refused(refused.0)
    }
}

/// A connection.
struct Session<C: Core> {
    handle: Handle<C>,
    key: DiskKey,
    live: Shared,
    /// Protocol features that were agreed upon.
    protocol: u64,
}

impl<C: Core> Session<C> {
    fn run(mut self, stream: UnixStream) {
        let end = self.talk(stream);
        let device = std::mem::take(&mut *lock(&self.live)).device;
        if let Some(device) = device {
            let _ = self.handle.call_blocking(move |desk| {
                desk.fronts.vhost.detach(desk.io, device);
            });
        }
        match end {
            Err(End::Closed | End::Gone) | Ok(()) => {
                tracing::info!(disk = self.key.0, "a vhost-user connection has ended");
            }
            Err(end) => tracing::warn!(disk = self.key.0, %end, "a vhost-user connection is ended"),
        }
    }

    fn talk(&mut self, mut stream: UnixStream) -> Result<(), End> {
        stream.set_nonblocking(false)?;
        lock(&self.live).stream = Some(stream.try_clone()?);
        let device = self.attach()?;
        lock(&self.live).device = Some(device);
        tracing::info!(disk = self.key.0, "a vhost-user connection");
        loop {
            let (header, payload, fds) = receive(&mut stream)?;
            let outcome = match message::parse(&header, &payload, fds) {
                Ok(command) => self.command(device, command)?,
                Err(refused) => Outcome::Refused(refused.0),
            };
            let acknowledge = header.need_reply && self.protocol & protocol::REPLY_ACK != 0;
            match outcome {
                Outcome::Reply(reply) => send(&stream, header.request, payload.len(), &reply)?,
                Outcome::Done if acknowledge => send(&stream, header.request, 0, &Reply::Number(0))?,
                Outcome::Refused(why) => {
                    let reply = message::refusal(header.request, &payload);
                    let number = acknowledge && !message::has_reply(header.request);
                    let Some(reply) = reply.or_else(|| number.then_some(Reply::Number(1))) else {
                        return Err(End::Refused(why));
                    };
                    tracing::warn!(disk = self.key.0, request = header.request, why, "a vhost-user message is refused");
                    send(&stream, header.request, payload.len(), &reply)?;
                }
                Outcome::Done | Outcome::Wait(_) => {}
                Outcome::Gone => return Err(End::Gone),
            }
        }
    }

    /// A device; that of the connection before may have requests under way for a while.
    fn attach(&self) -> Result<DeviceId, End> {
        let mut pause = WAIT.0;
        loop {
            let key = self.key;
            match self.handle.call_blocking(move |desk| desk.fronts.vhost.attach(desk.io, desk.core, key))? {
                Err(AttachError::Busy) => wait(&mut pause),
                Err(AttachError::NoDisk | AttachError::Stopping) => return Err(End::Gone),
                other => return Ok(other?),
            }
        }
    }

    fn command(&mut self, device: DeviceId, command: Command<OwnedFd>) -> Result<Outcome<()>, End> {
        if let Command::BackendRequests(fd) = command {
            let notices = UnixStream::from(fd);
            notices.set_nonblocking(true)?;
            lock(&self.live).notices = Some(notices);
            return Ok(Outcome::Done);
        }
        let protocol = if let Command::SetProtocolFeatures(bits) = &command { Some(*bits) } else { None };
        let first = self.handle.call_blocking(move |desk| {
            let Ok(command) = command.attach(|event| desk.io.attach_event(event)) else {
                return Outcome::Refused("what is no event counter, or more of them than can be open");
            };
            desk.fronts.vhost.command(desk.io, desk.core, device, command)
        })?;
        let mut outcome = first;
        let mut pause = WAIT.0;
        loop {
            outcome = match outcome {
                Outcome::Wait(command) => {
                    wait(&mut pause);
                    self.handle
                        .call_blocking(move |desk| desk.fronts.vhost.command(desk.io, desk.core, device, command))?
                }
                Outcome::Reply(reply) => return Ok(Outcome::Reply(reply)),
                Outcome::Done => {
                    if let Some(bits) = protocol {
                        self.protocol = bits;
                        lock(&self.live).config = bits & protocol::CONFIG != 0;
                    }
                    return Ok(Outcome::Done);
                }
                Outcome::Refused(why) => return Ok(Outcome::Refused(why)),
                Outcome::Gone => return Ok(Outcome::Gone),
            };
        }
    }
}

/// Sleeps, the next time for longer.
fn wait(pause: &mut Duration) {
    std::thread::sleep(*pause);
    *pause = (*pause * 2).min(WAIT.1);
}

/// The next message, with the descriptors that came along.
fn receive(stream: &mut UnixStream) -> Result<(Header, Vec<u8>, Vec<OwnedFd>), End> {
    let mut bytes = [0; HEADER];
    let mut fds = Vec::new();
    let mut got = 0;
    while got < HEADER {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut into = [IoSliceMut::new(&mut bytes[got..])];
        let received = match rustix::net::recvmsg(&*stream, &mut into, &mut control, RecvFlags::CMSG_CLOEXEC) {
            Err(rustix::io::Errno::INTR) => continue,
            other => other.map_err(io::Error::from)?,
        };
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                fds.extend(rights);
            }
        }
        if received.bytes == 0 {
            return Err(End::Closed);
        }
        got += received.bytes;
    }
    let header = Header::parse(&bytes)?;
    let mut payload = vec![0; header.len];
    stream.read_exact(&mut payload)?;
    Ok((header, payload, fds))
}

fn send(stream: &UnixStream, request: u32, like: usize, reply: &Reply) -> Result<(), End> {
    let bytes = message::reply(request, &reply.payload(like));
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let file = reply.file().map(|file| [file.as_fd()]);
    if let Some(file) = &file {
        control.push(SendAncillaryMessage::ScmRights(file));
    }
    let sent = rustix::net::sendmsg(stream, &[IoSlice::new(&bytes)], &mut control, SendFlags::NOSIGNAL)
        .map_err(io::Error::from)?;
    let mut rest = stream;
    rest.write_all(&bytes[sent..])?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_stand_in_their_folder_whatever_the_disk_is_called() {
        let dir = Path::new("/run/vhost");
        assert_eq!(socket(dir, "shop/data"), dir.join("shop-data.sock"));
        assert_eq!(socket(dir, "../x"), dir.join("-..-x.sock"));
        assert_eq!(uri(Some(dir), "a").as_deref(), Some("vhost-user:/run/vhost/a.sock"));
        assert_eq!(uri(None, "a"), None);
    }

    #[test]
    fn a_message_comes_whole_with_its_descriptors_and_a_reply_takes_one_along() {
        let (mut ours, mut theirs) = UnixStream::pair().unwrap();
        let reply = Reply::Inflight { len: 64, queues: 1, size: 2, file: ours.try_clone().unwrap().into() };
        send(&ours, 31, 24, &reply).unwrap();
        let mut bytes = [0; HEADER];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut into = [IoSliceMut::new(&mut bytes)];
        rustix::net::recvmsg(&theirs, &mut into, &mut control, RecvFlags::empty()).unwrap();
        assert_eq!(control.drain().count(), 1);
        let mut payload = [0; 24];
        theirs.read_exact(&mut payload).unwrap();
        assert_eq!(payload[16..20], [1, 0, 2, 0]);
        // Byte by byte.
        for byte in [1u32, 1, 8].iter().flat_map(|word| word.to_ne_bytes()).chain([7; 8]) {
            theirs.write_all(&[byte]).unwrap();
        }
        let (header, payload, fds) = receive(&mut ours).unwrap();
        assert_eq!((header.request, header.need_reply, payload, fds.len()), (1, false, vec![7; 8], 0));
        drop(theirs);
        assert!(matches!(receive(&mut ours), Err(End::Closed)));
    }
}
