//! Messages of the API: any bytes to every decoder, and messages made after their descriptors, full of almost right
//! values, to a coordinator with a group that is protected.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, OnceLock};
use std::time::Duration;

use afterimage_controlplane::bundle::Bundle;
use afterimage_controlplane::client;
use afterimage_controlplane::live::Live;
use afterimage_wire::v1::{self, DesiredState, ProxyMessage, Role, proxy_message};
use prost::Message;
use prost_types::field_descriptor_proto::{Label, Type};
use prost_types::{DescriptorProto, FileDescriptorSet};
use tokio::runtime::Runtime;
use tonic::Code;
use tonic::transport::Channel;

use crate::input::Input;

#[path = "../../../controlplane/tests/world/mod.rs"]
mod world;

/// Deepest message within a message that is made.
const DEPTH: usize = 5;
/// Longest that a call is waited for.
const PATIENCE: Duration = Duration::from_millis(300);

/// A method: its path, and the type of its request.
struct Method {
    path: String,
    request: String,
}

/// The API as its descriptors tell it.
struct Api {
    messages: HashMap<String, DescriptorProto>,
    methods: Vec<Method>,
}

fn api() -> &'static Api {
    static API: OnceLock<Api> = OnceLock::new();
    API.get_or_init(|| {
        let set = FileDescriptorSet::decode(v1::DESCRIPTORS).expect("our own descriptors");
        let (mut messages, mut methods) = (HashMap::new(), Vec::new());
        for file in set.file {
            let package = file.package().to_owned();
            for message in file.message_type {
                messages.insert(format!(".{package}.{}", message.name()), message);
            }
            for service in file.service {
                for method in &service.method {
                    let path = format!("/{package}.{}/{}", service.name(), method.name());
                    methods.push(Method { path, request: method.input_type().to_owned() });
                }
            }
        }
        Api { messages, methods }
    })
}

const TEXTS: &[&str] = &[
    "tenants/default",
    "tenants/default/groups/shop",
    "tenants/default/policies/gold",
    "tenants/default/proxies/src",
    "tenants/default/proxies/dr",
    "tenants/default/groups/shop/disks/data",
    "tenants/default/groups/shop/views/v1",
    "tenants/default/groups/shop/points/40",
    "tenants/default/operations/x",
    "tenants/other/groups/shop",
    "tenants/default/groups/../policies/gold",
    "shop",
    "gold",
    "v1",
    "data",
    "/disks/data",
    "/disks/new",
    "",
    "-",
    "\u{202e}shop",
    "a\0b",
    "\u{fffd}\u{10ffff}",
    "%2e%2e/\n",
    "00000000-0000-0000-0000-000000000000",
];

fn varint(mut value: u64, out: &mut Vec<u8>) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn text(input: &mut Input<'_>) -> Vec<u8> {
    match input.byte() {
        choice @ 0..=199 => TEXTS[usize::from(choice) % TEXTS.len()].into(),
        200..=209 => vec![b'x'; input.below(70_000) as usize],
        210..=215 => "\u{e9}".repeat(input.below(200) as usize).into(),
        216..=225 => String::from_utf8_lossy(input.take(20)).into_owned().into(),
        _ => input.number(1).to_string().into(),
    }
}

/// A message of this type; what it holds is what such messages hold, mostly.
fn make(kind: &str, input: &mut Input<'_>, depth: usize, out: &mut Vec<u8>) {
    let Some(message) = api().messages.get(kind) else { return };
    for field in &message.field {
        let often = if depth == 0 { 40 } else { 110 };
        if input.byte() < often {
            continue;
        }
        let count = if field.label() == Label::Repeated { input.below(4) } else { 1 };
        for _ in 0..count {
            let number = (field.number() as u64) << 3;
            let sized = |body: &[u8], out: &mut Vec<u8>| {
                varint(number | 2, out);
                varint(body.len() as u64, out);
                out.extend_from_slice(body);
            };
            match field.r#type() {
                Type::String => sized(&text(input), out),
                Type::Bytes => {
                    let len = usize::from(input.byte());
                    sized(input.take(len), out);
                }
                Type::Message | Type::Group if depth < DEPTH => {
                    let mut body = Vec::new();
                    make(field.type_name(), input, depth + 1, &mut body);
                    sized(&body, out);
                }
                Type::Message | Type::Group => {}
                Type::Double | Type::Fixed64 | Type::Sfixed64 => {
                    varint(number | 1, out);
                    out.extend(input.number(1).to_le_bytes());
                }
                Type::Float | Type::Fixed32 | Type::Sfixed32 => {
                    varint(number | 5, out);
                    out.extend((input.number(1) as u32).to_le_bytes());
                }
                Type::Enum => {
                    varint(number, out);
                    varint(if input.byte() < 240 { input.below(6) } else { input.number(1) }, out);
                }
                _ => {
                    varint(number, out);
                    varint(input.number(1000), out);
                }
            }
        }
    }
}

/// Any bytes, and a made message with a byte changed, to the decoders of everything that a peer sends first; reports are
/// taken in.
pub fn messages(data: &[u8]) {
    let mut input = Input::new(data);
    let bytes = if input.flag() {
        input.rest().to_vec()
    } else {
        let mut bytes = Vec::new();
        make(".afterimage.v1.ProxyMessage", &mut input, 1, &mut bytes);
        if input.flag() && !bytes.is_empty() {
            let at = input.below(bytes.len() as u64) as usize;
            bytes[at] = input.byte();
        }
        bytes
    };
    if let Ok(message) = ProxyMessage::decode(&bytes[..]) {
        assert_eq!(
            ProxyMessage::decode(&message.encode_to_vec()[..]).as_ref().map(Message::encoded_len),
            Ok(message.encoded_len())
        );
        if let Some(proxy_message::Message::Report(report)) = message.message {
            take_in(report);
        }
    }
    if let Ok(report) = v1::Report::decode(&bytes[..]) {
        take_in(report);
    }
    let _ = DesiredState::decode(&bytes[..]);
    let _ = v1::CoordinatorMessage::decode(&bytes[..]);
    let _ = v1::JoinRequest::decode(&bytes[..]);
}

fn take_in(report: v1::Report) {
    const SECOND: u64 = 1_000_000_000;
    let mut live = Live::default();
    let _ = live.report(SECOND, "proxy", report.clone(), 0, |_| true, |_| true);
    let _ = live.report(3 * SECOND, "proxy", report, 0, |_| true, |_| true);
    for stream in live.streams.values_mut() {
        stream.rpo.silence(60 * SECOND);
        let _ = stream.rpo.shown(60 * SECOND, 1000);
        let _ = stream.rates.shown(60 * SECOND);
    }
}

/// A coordinator with a group, and who calls it. Kept for all inputs: what one leaves behind, the next one meets.
struct Scene {
    runtime: Runtime,
    admin: Channel,
    eve: Bundle,
    eve_channel: Channel,
    _world: world::World,
    _proxies: (world::FakeProxy, world::FakeProxy),
}

/// Something in the coordinator has panicked; tokio keeps that from the caller.
static PANICKED: AtomicBool = AtomicBool::new(false);

fn scene() -> &'static Mutex<Scene> {
    static SCENE: OnceLock<Mutex<Scene>> = OnceLock::new();
    SCENE.get_or_init(|| {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .expect("threads can be made");
        let earlier = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            PANICKED.store(true, Ordering::SeqCst);
            earlier(info);
        }));
        let (world, proxies, eve, eve_channel) = runtime.block_on(async {
            let world = world::World::new().await;
            let proxies = world.shop().await;
            let eve = world.join(Role::Proxy, "eve").await;
            let channel = client::connect(&eve).await.expect("the port answers");
            (world, proxies, eve, channel)
        });
        Mutex::new(Scene { admin: world.channel.clone(), runtime, eve, eve_channel, _world: world, _proxies: proxies })
    })
}

/// Calls of every method with made messages, and a session of a proxy that says anything.
pub fn calls(data: &[u8]) {
    let mut input = Input::new(data);
    let scene = scene().lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    for _ in 0..4 {
        if input.is_empty() {
            break;
        }
        let methods = &api().methods;
        let method = &methods[input.below(methods.len() as u64) as usize];
        if method.path.ends_with("ProxyControl/Session") {
            scene.runtime.block_on(session(&scene, &mut input));
            continue;
        }
        let mut body = Vec::new();
        make(&method.request, &mut input, 0, &mut body);
        if method.path.ends_with("Certificates/RotateAuthority")
            && let Ok(said) = v1::RotateAuthorityRequest::decode(&body[..])
        {
            // Whoever locks everybody out is cut off, too, once it is answered: nobody could ask anything afterwards.
            body = v1::RotateAuthorityRequest { anyway: false, ..said }.encode_to_vec();
        }
        let answer = scene
            .runtime
            .block_on(async { tokio::time::timeout(PATIENCE, call(scene.admin.clone(), &method.path, body)).await });
        if let Ok(Err(status)) = answer {
            let surprise = matches!(status.code(), Code::Unknown | Code::Internal | Code::DataLoss | Code::Unavailable);
            assert!(
                !surprise || status.message().contains("UTF-8") || status.message().contains("proxy"),
                "{}: {status:?}",
                method.path
            );
            assert!(status.message().len() < 4000, "{}: what is echoed is bounded", method.path);
        }
    }
    // Whatever was said, the next caller is answered.
    let list = v1::ListPoliciesRequest { parent: world::TENANT.into(), ..Default::default() };
    let path = "/afterimage.v1.Policies/ListPolicies";
    let answer = scene.runtime.block_on(async {
        tokio::time::timeout(Duration::from_secs(20), call(scene.admin.clone(), path, list.encode_to_vec())).await
    });
    assert!(matches!(answer, Ok(Ok(()))), "the coordinator does not answer: {answer:?}");
    assert!(!PANICKED.swap(false, Ordering::SeqCst), "a task of the coordinator has panicked");
}

async fn session(scene: &Scene, input: &mut Input<'_>) {
    use afterimage_wire::v1::proxy_control_client::ProxyControlClient;
    let mut said = Vec::new();
    if input.byte() < 230 {
        let register = world::register(&scene.eve, &world::Script::default());
        said.push(ProxyMessage { message: Some(proxy_message::Message::Register(register)) });
    }
    for _ in 0..input.below(6) {
        let mut bytes = Vec::new();
        make(".afterimage.v1.ProxyMessage", input, 1, &mut bytes);
        said.extend(ProxyMessage::decode(&bytes[..]));
    }
    let stream = ProxyControlClient::new(scene.eve_channel.clone()).session(tokio_stream::iter(said)).await;
    if let Ok(stream) = stream {
        let mut stream = stream.into_inner();
        let read = async { while let Ok(Some(_)) = stream.message().await {} };
        let _ = tokio::time::timeout(PATIENCE, read).await;
    }
}

async fn call(channel: Channel, path: &str, body: Vec<u8>) -> Result<(), tonic::Status> {
    let mut client = tonic::client::Grpc::new(channel);
    client.ready().await.map_err(|error| tonic::Status::unavailable(error.to_string()))?;
    let path = path.parse().expect("made of identifiers");
    let mut answer = client.server_streaming(tonic::Request::new(body), path, Raw).await?.into_inner();
    answer.message().await.map(drop)
}

/// Sends bytes as they are.
#[derive(Clone, Copy, Default)]
struct Raw;

impl tonic::codec::Codec for Raw {
    type Encode = Vec<u8>;
    type Decode = ();
    type Encoder = Self;
    type Decoder = Self;
    fn encoder(&mut self) -> Self {
        Self
    }
    fn decoder(&mut self) -> Self {
        Self
    }
}

impl tonic::codec::Encoder for Raw {
    type Item = Vec<u8>;
    type Error = tonic::Status;
    fn encode(&mut self, item: Vec<u8>, to: &mut tonic::codec::EncodeBuf<'_>) -> Result<(), tonic::Status> {
        bytes::BufMut::put_slice(to, &item);
        Ok(())
    }
}

impl tonic::codec::Decoder for Raw {
    type Item = ();
    type Error = tonic::Status;
    fn decode(&mut self, from: &mut tonic::codec::DecodeBuf<'_>) -> Result<Option<()>, tonic::Status> {
        let length = bytes::Buf::remaining(from);
        bytes::Buf::advance(from, length);
        Ok(Some(()))
    }
}
