//! Health, as the text of `grpc.health.v1` has it: a service that is not there is NOT_FOUND to a check, and
//! SERVICE_UNKNOWN, on a stream that stays open, to a watch.

use std::pin::Pin;
use std::sync::Arc;

use afterimage_wire::v1;
use prost::Message;
use prost_types::{FileDescriptorProto, FileDescriptorSet};
use tokio::sync::mpsc;
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_server::Health;
use tonic_health::pb::{HealthCheckRequest, HealthCheckResponse};

use crate::coordinator::Coordinator;

/// The service. All services live and end with the coordinator.
pub struct HealthService {
    coordinator: Arc<Coordinator>,
    names: Vec<String>,
}

impl HealthService {
    /// Knows every service of the API.
    pub fn new(coordinator: Arc<Coordinator>) -> Self {
        Self { coordinator, names: service_names() }
    }

    /// The empty name is the server as a whole.
    fn knows(&self, name: &str) -> bool {
        name.is_empty() || self.names.iter().any(|known| known == name)
    }

    fn status(&self) -> ServingStatus {
        if *self.coordinator.closing().borrow() { ServingStatus::NotServing } else { ServingStatus::Serving }
    }
}

fn response(status: ServingStatus) -> HealthCheckResponse {
    HealthCheckResponse { status: status.into() }
}

/// Full names of the services in our descriptors.
fn service_names() -> Vec<String> {
    let set = FileDescriptorSet::decode(v1::DESCRIPTORS).unwrap_or_default();
    let of = |file: FileDescriptorProto| {
        let package = file.package().to_owned();
        file.service.into_iter().map(move |service| format!("{package}.{}", service.name())).collect::<Vec<_>>()
    };
    set.file.into_iter().flat_map(of).collect()
}

#[tonic::async_trait]
impl Health for HealthService {
    async fn check(&self, request: Request<HealthCheckRequest>) -> Result<Response<HealthCheckResponse>, Status> {
        if self.knows(&request.get_ref().service) {
            Ok(Response::new(response(self.status())))
        } else {
            Err(Status::not_found("there is no such service"))
        }
    }

    type WatchStream = Pin<Box<dyn Stream<Item = Result<HealthCheckResponse, Status>> + Send>>;

    async fn watch(&self, request: Request<HealthCheckRequest>) -> Result<Response<Self::WatchStream>, Status> {
        let known = self.knows(&request.get_ref().service);
        let first = if known { self.status() } else { ServingStatus::ServiceUnknown };
        let (sender, receiver) = mpsc::channel(2);
        // A new channel of two has room.
        let _ = sender.try_send(Ok(response(first)));
        let closed = self.coordinator.closed();
        tokio::spawn(async move {
            tokio::select! {
                () = closed => if known {
                    let _ = sender.try_send(Ok(response(ServingStatus::NotServing)));
                },
                () = sender.closed() => {}
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_services_are_those_of_the_descriptors() {
        let names = service_names();
        for service in
            ["Policies", "Groups", "Proxies", "Points", "Failovers", "Operations", "Views", "Machines", "Status"]
        {
            assert!(names.contains(&format!("afterimage.v1.{service}")), "{service}: {names:?}");
        }
    }
}
