//! ublk devices: hosts' requests on one side, a process that fetches and answers them on the other.
//!
//! A device outlives the process that serves it: what that had not answered is asked again of the next
//! (`UBLK_F_USER_RECOVERY_REISSUE`). After a power loss it is gone.

use std::collections::VecDeque;

use super::state::{Event, LifeId, State};
use super::{NodeId, SimIo, World};
use crate::io::{Done, Errno, File, Part, Token, UblkOp};

const DESCRIPTOR: usize = 24;

/// Names a device of the world.
#[derive(Copy, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct UblkId(usize);

/// What a host heard.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UblkAnswer {
    /// Of this request.
    pub request: u64,
    /// As it was committed.
    pub result: i32,
    /// The request's data, changed by a read.
    pub data: Vec<u8>,
}

struct Asked {
    id: u64,
    descriptor: [u8; DESCRIPTOR],
    data: Vec<u8>,
}

enum Tag {
    /// Its process has not fetched it yet.
    Idle,
    /// A fetch is under way.
    Fetched(Token),
    /// Its process has the request.
    Busy(Asked),
}

pub(super) struct Device {
    node: usize,
    server: Option<(LifeId, File)>,
    tags: Vec<Tag>,
    queue: VecDeque<Asked>,
    answers: Vec<UblkAnswer>,
    stopped: bool,
}

impl World {
    /// A device with so many tags that nobody serves yet.
    pub fn ublk_device(&self, node: NodeId, depth: u16) -> UblkId {
        let mut state = self.0.borrow_mut();
        state.ublk.push(Device {
            node: node.0 as usize,
            server: None,
            tags: (0..depth).map(|_| Tag::Idle).collect(),
            queue: VecDeque::new(),
            answers: Vec::new(),
            stopped: false,
        });
        UblkId(state.ublk.len() - 1)
    }

    /// A host asks: a descriptor, and the request's data (of a read: room for it). Returns the request's number.
    pub fn ublk_ask(&self, device: UblkId, descriptor: [u8; DESCRIPTOR], data: Vec<u8>) -> u64 {
        let mut state = self.0.borrow_mut();
        let id = state.id();
        state.ublk[device.0].queue.push_back(Asked { id, descriptor, data });
        state.dispatch(device.0);
        id
    }

    /// What hosts have heard since this was last asked.
    pub fn ublk_answers(&self, device: UblkId) -> Vec<UblkAnswer> {
        std::mem::take(&mut self.0.borrow_mut().ublk[device.0].answers)
    }

    /// Requests that are not answered.
    pub fn ublk_pending(&self, device: UblkId) -> usize {
        let state = self.0.borrow();
        let device = &state.ublk[device.0];
        device.queue.len() + device.tags.iter().filter(|tag| matches!(tag, Tag::Busy(_))).count()
    }

    /// The device ends: fetches end with `ENODEV`, what is queued is never answered.
    pub fn ublk_stop(&self, device: UblkId) {
        let mut state = self.0.borrow_mut();
        let device = &mut state.ublk[device.0];
        device.stopped = true;
        device.queue.clear();
        let ended: Vec<Token> = device
            .tags
            .iter_mut()
            .filter_map(|tag| match tag {
                Tag::Fetched(token) => {
                    let token = *token;
                    *tag = Tag::Idle;
                    Some(token)
                }
                Tag::Idle | Tag::Busy(_) => None,
            })
            .collect();
        if let Some((life, _)) = device.server {
            let now = state.now;
            ended.into_iter().for_each(|token| state.complete_at(now, life, token, Err(Errno::NODEV)));
        }
    }

    /// Whether a process has the device open.
    pub fn ublk_served(&self, device: UblkId) -> bool {
        self.0.borrow().ublk[device.0].server.is_some()
    }
}

impl SimIo {
    /// Takes over a device, as [`crate::io::ring::Ring::attach_ublk`] does.
    ///
    /// # Errors
    /// `EBUSY` if a process has it, `ENODEV` if it has ended.
    pub fn attach_ublk(&mut self, device: UblkId) -> Result<File, Errno> {
        let mut state = self.world.0.borrow_mut();
        let found = &state.ublk[device.0];
        assert_eq!(found.node, state.lives[self.life].node, "a device of another node");
        if found.stopped {
            return Err(Errno::NODEV);
        }
        if found.server.is_some() {
            return Err(Errno::BUSY);
        }
        let file = state.new_file(self.life);
        state.ublk[device.0].server = Some((self.life, file));
        Ok(file)
    }
}

impl State {
    fn ublk_of(&self, life: LifeId, file: File) -> Option<usize> {
        self.ublk.iter().position(|device| device.server == Some((life, file)))
    }

    /// Gives requests to tags that are fetched.
    fn dispatch(&mut self, index: usize) {
        let Some((life, _)) = self.ublk[index].server else { return };
        loop {
            let device = &mut self.ublk[index];
            let Some(at) = device.tags.iter().position(|tag| matches!(tag, Tag::Fetched(_))) else { return };
            let Some(asked) = device.queue.pop_front() else { return };
            let Tag::Fetched(token) = std::mem::replace(&mut device.tags[at], Tag::Busy(asked)) else { return };
            let at = self.now + self.rng.below(20_000);
            self.complete_at(at, life, token, Ok(0));
        }
    }

    pub(super) fn submit_ublk(&mut self, life: LifeId, token: Token, op: UblkOp) {
        let (UblkOp::Fetch { device, .. } | UblkOp::CopyIn { device, .. } | UblkOp::CopyOut { device, .. }) = &op;
        let index = self.ublk_of(life, *device);
        let index = index.unwrap_or_else(|| panic!("{device:?} is no ublk device of this process"));
        let at = self.now + self.rng.below(10_000);
        match op {
            UblkOp::Fetch { tag, commit, .. } => {
                let device = &mut self.ublk[index];
                let place = &mut device.tags[usize::from(tag)];
                match (std::mem::replace(place, Tag::Idle), commit) {
                    (Tag::Idle, None) => {}
                    (Tag::Busy(asked), Some(result)) => {
                        device.answers.push(UblkAnswer { request: asked.id, result, data: asked.data });
                    }
                    (Tag::Idle, Some(_)) => panic!("tag {tag} holds no request, and is answered"),
                    (Tag::Busy(_), None) => panic!("tag {tag} holds a request that is not answered"),
                    (Tag::Fetched(_), _) => panic!("tag {tag} is fetched twice"),
                }
                if device.stopped {
                    return self.complete_at(at, life, token, Err(Errno::NODEV));
                }
                device.tags[usize::from(tag)] = Tag::Fetched(token);
                self.dispatch(index);
            }
            UblkOp::CopyIn { tag, at: from, mut part, .. } => {
                let result = self.data(index, tag, from, &part).map(|data| {
                    part.buf[part.at..part.at + part.len].copy_from_slice(data);
                    part.len as u64
                });
                self.at(at, Event::Complete(life, Done { token, result, part: Some(part), parts: Vec::new() }));
            }
            UblkOp::CopyOut { tag, at: from, part, .. } => {
                let result = self.data(index, tag, from, &part).map(|data| {
                    data.copy_from_slice(&part.buf[part.at..part.at + part.len]);
                    part.len as u64
                });
                self.at(at, Event::Complete(life, Done { token, result, part: Some(part), parts: Vec::new() }));
            }
        }
    }

    /// The range of a request's data that is copied.
    fn data(&mut self, index: usize, tag: u16, from: u32, part: &Part) -> Result<&mut [u8], Errno> {
        assert!(part.at + part.len <= part.buf.len(), "a copy past its buffer");
        match &mut self.ublk[index].tags[usize::from(tag)] {
            Tag::Busy(asked) => asked.data.get_mut(from as usize..from as usize + part.len).ok_or(Errno::INVAL),
            Tag::Idle | Tag::Fetched(_) => Err(Errno::INVAL),
        }
    }

    pub(super) fn ublk_descriptor(&self, life: LifeId, file: File, tag: u16) -> Result<[u8; DESCRIPTOR], Errno> {
        let device = &self.ublk[self.ublk_of(life, file).ok_or(Errno::BADF)?];
        match device.tags.get(usize::from(tag)) {
            Some(Tag::Busy(asked)) => Ok(asked.descriptor),
            _ => Err(Errno::INVAL),
        }
    }

    /// Closes a device; false if the file is none.
    pub(super) fn close_ublk(&mut self, life: LifeId, file: File) -> bool {
        let Some(index) = self.ublk_of(life, file) else { return false };
        assert!(
            !self.ublk[index].tags.iter().any(|tag| matches!(tag, Tag::Fetched(_))),
            "a device is closed while its tags are fetched"
        );
        self.ublk[index].server = None;
        true
    }

    /// The process of a device has died: what it had is asked again, of the next one.
    pub(super) fn requeue_ublk(&mut self, life: LifeId) {
        for device in self.ublk.iter_mut().filter(|device| device.server.is_some_and(|(of, _)| of == life)) {
            device.server = None;
            for tag in &mut device.tags {
                if let Tag::Busy(asked) = std::mem::replace(tag, Tag::Idle) {
                    device.queue.push_front(asked);
                }
            }
        }
    }

    /// The machine has lost power: its devices are gone, and those who used them.
    pub(super) fn lose_ublk(&mut self, node: usize) {
        for device in self.ublk.iter_mut().filter(|device| device.node == node) {
            device.server = None;
            device.stopped = true;
            device.queue.clear();
            device.tags.iter_mut().for_each(|tag| *tag = Tag::Idle);
        }
    }
}
