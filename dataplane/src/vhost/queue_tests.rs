//! A process dies after each single store that it makes into shared memory; the next one goes on.

use std::sync::Arc;

use super::super::inflight;
use super::*;
use crate::io::guest::tests::STORES;
use crate::io::guest::{Map, Region, share};

const SIZE: u16 = 8;
const GUEST: u64 = 0x10_0000;
const DESC_AT: usize = 0;
const AVAIL_AT: usize = 4096;
const USED_AT: usize = 8192;

struct Guest {
    map: Arc<Map>,
    memory: GuestMemory,
    area: Arc<Map>,
    avail: u16,
}

impl Guest {
    fn new() -> Self {
        let (_, map) = share("guest", 16384).unwrap();
        let (_, area) = share("inflight", inflight::bytes(1, SIZE)).unwrap();
        let map = Arc::new(map);
        let memory = GuestMemory::new(vec![Region { guest: GUEST, user: GUEST, map: Arc::clone(&map) }]).unwrap();
        Self { map, memory, area: Arc::new(area), avail: 0 }
    }

    /// Makes the request with this head available: one descriptor.
    fn offer(&mut self, head: u16) {
        let mut desc = [0; DESC];
        desc[..8].copy_from_slice(&(GUEST + 12288).to_le_bytes());
        desc[8] = 16;
        self.map.write(DESC_AT + usize::from(head) * DESC, &desc).unwrap();
        self.map.store16(AVAIL_AT + 4 + usize::from(self.avail % SIZE) * 2, head).unwrap();
        self.avail = self.avail.wrapping_add(1);
        self.map.store16(AVAIL_AT + 2, self.avail).unwrap();
    }

    fn start(&self, base: u16) -> Queue {
        let at =
            Addresses { desc: GUEST + DESC_AT as u64, avail: GUEST + AVAIL_AT as u64, used: GUEST + USED_AT as u64 };
        let area = inflight::Inflight::new(&self.area, 0, SIZE).unwrap();
        Queue::start(&self.memory, at, SIZE, base, Agreed::default(), Some(area)).unwrap()
    }

    fn take(&self, queue: &mut Queue) -> Option<u16> {
        queue.take(&self.memory, &mut Chain::default(), false).unwrap()
    }

    /// Heads whose end the guest has seen, in order.
    fn ended(&self) -> Vec<u16> {
        let used = self.map.load16(USED_AT + 2).unwrap();
        (0..used).map(|at| self.map.load16(USED_AT + 4 + usize::from(at % SIZE) * 8).unwrap()).collect()
    }
}

/// What the first process does: `None` takes the next request, `Some` ends that one.
const LIFE: [Option<u16>; 8] = [None, None, Some(5), None, Some(2), None, None, Some(7)];
const HEADS: [u16; 6] = [2, 5, 0, 7, 1, 3];

fn live(guest: &Guest) {
    let mut queue = guest.start(0);
    for step in LIFE {
        match step {
            None => drop(guest.take(&mut queue)),
            Some(head) => queue.end(head, 1).unwrap(),
        }
    }
}

/// Ends all that is left, in the order in which it is taken; what was taken.
fn finish(guest: &Guest) -> Vec<u16> {
    let mut queue = guest.start(0);
    let mut taken = Vec::new();
    while let Some(head) = guest.take(&mut queue) {
        taken.push(head);
    }
    for head in taken.iter().rev() {
        queue.end(*head, 1).unwrap();
    }
    taken
}

#[test]
fn whenever_a_process_dies_each_request_ends_once_and_none_is_lost() {
    let mut stores = 0;
    loop {
        let mut guest = Guest::new();
        HEADS.iter().for_each(|head| guest.offer(*head));
        STORES.set(Some(stores));
        live(&guest);
        let all_stored = STORES.take() != Some(0);
        let seen = guest.ended();
        let again = finish(&guest);
        let expected: Vec<u16> = HEADS.iter().copied().filter(|head| !seen.contains(head)).collect();
        assert_eq!(again, expected, "dead after {stores} stores: in the order in which they came");
        let mut all = guest.ended();
        all.sort_unstable();
        assert_eq!(all, [0, 1, 2, 3, 5, 7], "dead after {stores} stores");
        if all_stored {
            break;
        }
        stores += 1;
    }
    assert!(stores > 30, "each of {stores} stores was the last one");
}

#[test]
fn a_second_death_while_the_first_is_mended_changes_nothing() {
    for first in 0..60 {
        for second in 0..60 {
            let mut guest = Guest::new();
            HEADS.iter().for_each(|head| guest.offer(*head));
            STORES.set(Some(first));
            live(&guest);
            STORES.set(Some(second));
            finish(&guest);
            STORES.set(None);
            finish(&guest);
            let mut all = guest.ended();
            all.sort_unstable();
            assert_eq!(all, [0, 1, 2, 3, 5, 7], "dead after {first} and {second} stores");
        }
    }
}

#[test]
fn marks_that_are_lies_harm_nobody() {
    for at in 0..inflight::bytes(1, SIZE) as usize {
        for value in [1, 0x7f, 0xff] {
            let mut guest = Guest::new();
            HEADS.iter().for_each(|head| guest.offer(*head));
            live(&guest);
            guest.area.write(at, &[value]).unwrap();
            let mut queue = guest.start(0);
            // It may find nonsense; it ends, and takes no head twice.
            let mut heads = Vec::new();
            while let Ok(Some(head)) = queue.take(&guest.memory, &mut Chain::default(), false) {
                assert!(!heads.contains(&head));
                heads.push(head);
                assert!(heads.len() <= usize::from(SIZE));
            }
        }
    }
}

#[test]
fn calls_and_kicks_go_by_the_indices_that_were_agreed_upon() {
    let mut guest = Guest::new();
    let at = Addresses { desc: GUEST + DESC_AT as u64, avail: GUEST + AVAIL_AT as u64, used: GUEST + USED_AT as u64 };
    let agreed = Agreed { event_idx: true, indirect: false };
    let mut queue = Queue::start(&guest.memory, at, SIZE, 0, agreed, None).unwrap();
    let avail_event = |guest: &Guest| guest.map.load16(USED_AT + 4 + usize::from(SIZE) * 8).unwrap();
    let used_event = |guest: &Guest, value| guest.map.store16(AVAIL_AT + 4 + usize::from(SIZE) * 2, value).unwrap();
    assert_eq!(queue.want_kicks(), Ok(false));
    assert_eq!(avail_event(&guest), 0);
    guest.offer(3);
    guest.offer(4);
    assert_eq!(guest.take(&mut queue), Some(3));
    assert!(!queue.kicks_wanted(), "the index at which one was wanted has passed");
    assert_eq!(queue.want_kicks(), Ok(true), "there is one more");
    assert_eq!(guest.take(&mut queue), Some(4));
    assert_eq!(queue.want_kicks(), Ok(false));
    assert_eq!(avail_event(&guest), 2);
    used_event(&guest, 1);
    queue.end(3, 1).unwrap();
    assert_eq!(queue.call_due(), Ok(true), "the first end is always told");
    assert_eq!(queue.call_due(), Ok(false));
    used_event(&guest, 1);
    queue.end(4, 1).unwrap();
    assert_eq!(queue.call_due(), Ok(true));
    guest.offer(3);
    guest.take(&mut queue);
    used_event(&guest, 5);
    queue.end(3, 1).unwrap();
    assert_eq!(queue.call_due(), Ok(false), "the driver waits for a later one");
}

#[test]
fn without_indices_flags_say_whether_to_call_and_to_kick() {
    let mut guest = Guest::new();
    let mut queue = guest.start(0);
    queue.want_kicks().unwrap();
    queue.need_no_kicks().unwrap();
    assert_eq!(guest.map.load16(USED_AT), Ok(NO_NOTIFY));
    queue.want_kicks().unwrap();
    assert_eq!(guest.map.load16(USED_AT), Ok(0));
    guest.offer(1);
    guest.take(&mut queue);
    guest.map.store16(AVAIL_AT, NO_INTERRUPT).unwrap();
    queue.end(1, 1).unwrap();
    assert_eq!(queue.call_due(), Ok(false));
    guest.offer(1);
    guest.take(&mut queue);
    guest.map.store16(AVAIL_AT, 0).unwrap();
    queue.end(1, 1).unwrap();
    assert_eq!(queue.call_due(), Ok(true));
}

#[test]
fn an_available_index_that_jumps_stops_the_queue() {
    let mut guest = Guest::new();
    guest.offer(1);
    let mut queue = guest.start(0);
    guest.map.store16(AVAIL_AT + 2, SIZE + 1).unwrap();
    assert!(queue.take(&guest.memory, &mut Chain::default(), false).is_err());
    guest.map.store16(AVAIL_AT + 2, 2).unwrap();
    guest.map.store16(AVAIL_AT + 6, 1).unwrap();
    assert_eq!(guest.take(&mut queue), Some(1));
    assert!(queue.take(&guest.memory, &mut Chain::default(), false).is_err(), "it is under way");
}
