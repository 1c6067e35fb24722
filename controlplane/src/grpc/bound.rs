//! How many connections a port takes, in all and from one address. What is beyond is closed at once: those that are open
//! go on, and a host that opens them without end takes nobody else's.

use std::collections::HashMap;
use std::io;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_stream::Stream;
use tonic::transport::server::{Connected, TcpConnectInfo, TcpIncoming};

/// Most connections of a coordinator, over all its ports.
pub const MAX_CONNECTIONS: usize = 4096;
/// Most connections from one address.
pub const MAX_PER_ADDRESS: usize = 512;

/// Connections that are open, by address. An entry is there only while one is.
#[derive(Debug)]
pub struct Open {
    by_address: Mutex<Counts>,
    per_address: usize,
}

impl Default for Open {
    fn default() -> Self {
        Self { by_address: Mutex::default(), per_address: MAX_PER_ADDRESS }
    }
}

#[derive(Debug, Default)]
struct Counts {
    all: usize,
    of: HashMap<IpAddr, usize>,
}

impl Open {
    /// For connections that all come from one address: who passes them on has counted them.
    pub(super) fn passed_on() -> Self {
        Self { per_address: MAX_CONNECTIONS, ..Self::default() }
    }

    /// Counts one more from there; none if that would be too many.
    pub(super) fn enter(self: &Arc<Self>, address: IpAddr) -> Option<Entry> {
        // ::ffff:a.b.c.d is a.b.c.d.
        let address = address.to_canonical();
        let mut counts = self.by_address.lock().expect("nothing panics while it holds this");
        let here = counts.of.get(&address).copied().unwrap_or(0);
        if counts.all >= MAX_CONNECTIONS || here >= self.per_address {
            return None;
        }
        counts.all += 1;
        counts.of.insert(address, here + 1);
        Some(Entry { open: self.clone(), address })
    }
}

/// An open connection's place; given back when it is dropped.
#[derive(Debug)]
pub(super) struct Entry {
    open: Arc<Open>,
    address: IpAddr,
}

impl Drop for Entry {
    fn drop(&mut self) {
        let mut counts = self.open.by_address.lock().expect("nothing panics while it holds this");
        counts.all -= 1;
        if let Some(here) = counts.of.get_mut(&self.address) {
            *here -= 1;
            if *here == 0 {
                counts.of.remove(&self.address);
            }
        }
    }
}

/// Accepts within the bounds.
pub struct Bounded {
    incoming: TcpIncoming,
    open: Arc<Open>,
}

impl Bounded {
    /// `open` is shared by all ports.
    pub fn new(incoming: TcpIncoming, open: Arc<Open>) -> Self {
        Self { incoming, open }
    }
}

impl Stream for Bounded {
    type Item = io::Result<Counted>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        loop {
            let stream = match Pin::new(&mut self.incoming).poll_next(cx) {
                Poll::Ready(Some(Ok(stream))) => stream,
                Poll::Ready(Some(Err(error))) => return Poll::Ready(Some(Err(error))),
                Poll::Ready(None) => return Poll::Ready(None),
                Poll::Pending => return Poll::Pending,
            };
            // One whose peer is gone already has no address.
            let Ok(peer) = stream.peer_addr() else { continue };
            match self.open.enter(peer.ip()) {
                Some(entry) => return Poll::Ready(Some(Ok(Counted { stream, _entry: entry }))),
                None => tracing::warn!(%peer, "too many connections: this one is closed"),
            }
        }
    }
}

/// A connection that is counted.
#[derive(Debug)]
pub struct Counted {
    stream: TcpStream,
    _entry: Entry,
}

impl Connected for Counted {
    type ConnectInfo = TcpConnectInfo;

    fn connect_info(&self) -> TcpConnectInfo {
        self.stream.connect_info()
    }
}

impl AsyncRead for Counted {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Counted {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, parts)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_address_takes_no_more_than_its_share() {
        let open = Arc::new(Open::default());
        let (a, b): (IpAddr, IpAddr) = ([10, 0, 0, 1].into(), [10, 0, 0, 2].into());
        let held: Vec<_> = (0..MAX_PER_ADDRESS).map(|_| open.enter(a).unwrap()).collect();
        assert!(open.enter(a).is_none());
        assert!(open.enter("::ffff:10.0.0.1".parse().unwrap()).is_none(), "written another way");
        assert!(open.enter(b).is_some());
        drop(held);
        assert!(open.enter(a).is_some());
        assert_eq!(open.by_address.lock().unwrap().all, 0);
        assert!(open.by_address.lock().unwrap().of.is_empty());
    }

    #[test]
    fn all_together_are_bounded() {
        let open = Arc::new(Open::default());
        let address = |n: usize| IpAddr::from([10, 0, (n / MAX_PER_ADDRESS) as u8, 1]);
        let held: Vec<_> = (0..MAX_CONNECTIONS).map(|n| open.enter(address(n)).unwrap()).collect();
        assert!(open.enter([192, 168, 0, 1].into()).is_none());
        drop(held);
        assert!(open.enter([192, 168, 0, 1].into()).is_some());
    }
}
