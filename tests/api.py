"""The API as a client in another language sees it: one generated from the .proto files by protoc, with the usual gRPC
library of Python. Services, reflection and health as their texts say, codes as the protocol defines them, and callers
who mean ill.

Run by `tests/all api`, with a Python that has grpcio, grpcio-tools, grpcio-health-checking, grpcio-reflection and
grpcio-status.
"""

import base64
import json
import pathlib
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time

from cluster import AFTERIMAGE, ROOT, Process, Tests, eventually, expect, free_port

FOLDER = pathlib.Path(tempfile.mkdtemp(prefix="afterimage-api-"))
GENERATED = FOLDER / "generated"
GENERATED.mkdir()
PROTOS = sorted((ROOT / "wire/proto/afterimage/v1").glob("*.proto"))
subprocess.run([sys.executable, "-m", "grpc_tools.protoc", f"-I{ROOT / 'wire/proto'}", f"--python_out={GENERATED}",
                f"--grpc_python_out={GENERATED}", *map(str, PROTOS)], check=True)
sys.path.insert(0, str(GENERATED))

import grpc  # noqa: E402
from afterimage.v1 import coordinator_pb2 as api  # noqa: E402
from afterimage.v1 import coordinator_pb2_grpc as services  # noqa: E402
from google.protobuf import field_mask_pb2  # noqa: E402
from google.rpc import error_details_pb2  # noqa: E402
from grpc_health.v1 import health_pb2, health_pb2_grpc  # noqa: E402
from grpc_status import rpc_status  # noqa: E402

TENANT = "tenants/default"
NAME = (("grpc.ssl_target_name_override", "coordinator.afterimage"),)
SERVICES = ["Policies", "Groups", "Proxies", "Points", "Failovers", "Operations", "Views", "Status", "Backups",
            "Certificates", "Enrolment", "ProxyControl"]


class Coordinator:
    """A coordinator on loopback, and the admin's way to it."""

    def __init__(self, name="data", *args):
        self.port = free_port()
        self.data = FOLDER / name
        self.process = Process(FOLDER, f"coordinator-{name}", "coordinator", "--data-dir", self.data, "--listen",
                               f"127.0.0.1:{self.port}", *args)
        bundle = self.data / "admin.json"
        self.bundle = eventually("the coordinator makes its bundle", lambda: self.read(bundle))
        self.channel = self.connect()
        grpc.channel_ready_future(self.channel).result(timeout=20)

    @staticmethod
    def read(path):
        try:
            return json.loads(path.read_text())
        except (OSError, ValueError):
            return None

    def connect(self, certificate=True, options=()):
        bundle = certificate if isinstance(certificate, dict) else self.bundle
        pem = {name: bundle[name].encode() for name in ("certificate_pem", "key_pem")}
        pem["ca_pem"] = self.bundle["ca_pem"].encode()
        own = (pem["key_pem"], pem["certificate_pem"]) if certificate else (None, None)
        credentials = grpc.ssl_channel_credentials(pem["ca_pem"], *own)
        return grpc.secure_channel(f"127.0.0.1:{self.port}", credentials, options=(*NAME, *options))


def code(call, *args, **options):
    """The code with which a call fails."""
    try:
        answer = call(*args, timeout=options.pop("timeout", 20), **options)
        if hasattr(answer, "__next__"):
            next(answer)
    except grpc.RpcError as error:
        return error.code()
    raise AssertionError("it was not refused")


def equal(found, wanted, what):
    expect(found == wanted, f"{what}: {found}, not {wanted}")


def policies(at):
    stub = services.PoliciesStub(at.channel)
    create = lambda name, **policy: stub.CreatePolicy(  # noqa: E731
        api.CreatePolicyRequest(parent=TENANT, policy_id=name, policy=api.Policy(**policy)), timeout=20)
    made = create("gold", rpo_target_us=500_000)
    equal(made.name, f"{TENANT}/policies/gold", "name")
    got = stub.GetPolicy(api.GetPolicyRequest(name=made.name), timeout=20)
    equal(got, made, "what is read")
    listed = stub.ListPolicies(api.ListPoliciesRequest(parent=TENANT), timeout=20)
    equal([p.name for p in listed.policies], [made.name], "list")
    request = api.CreatePolicyRequest(parent=TENANT, policy_id="gold", policy=api.Policy())
    equal(code(stub.CreatePolicy, request), grpc.StatusCode.ALREADY_EXISTS, "the same again")
    missing = api.GetPolicyRequest(name=f"{TENANT}/policies/none")
    equal(code(stub.GetPolicy, missing), grpc.StatusCode.NOT_FOUND, "what is not there")
    for name in ["", "A", "a/b", "\u0430", "a" * 64, "..", "a\u200b"]:
        request = api.CreatePolicyRequest(parent=TENANT, policy_id=name, policy=api.Policy())
        equal(code(stub.CreatePolicy, request), grpc.StatusCode.INVALID_ARGUMENT, f"name {name!r}")
    stale = api.DeletePolicyRequest(name=made.name, etag="stale")
    equal(code(stub.DeletePolicy, stale), grpc.StatusCode.ABORTED, "an old etag")
    other = api.ListPoliciesRequest(parent="tenants/other")
    equal(code(stub.ListPolicies, other), grpc.StatusCode.INVALID_ARGUMENT, "another tenant")


def details(call, request):
    """The code with which a call fails, and the details of the error by their types."""
    try:
        call(request, timeout=20)
    except grpc.RpcError as error:
        found = {}
        for packed in rpc_status.from_call(error).details:
            kind = getattr(error_details_pb2, packed.TypeName().rsplit(".", 1)[1])
            found[kind.__name__] = kind.FromString(packed.value)
        return error.code(), found
    raise AssertionError("it was not refused")


def standards(at):
    """Masks, etags, request ids, checks only, pages, filters: as the API improvement proposals describe them."""
    stub = services.PoliciesStub(at.channel)
    create = lambda name, **more: stub.CreatePolicy(api.CreatePolicyRequest(  # noqa: E731
        parent=TENANT, policy_id=name, policy=api.Policy(description=f"number {name}"), **more), timeout=20)
    mask = lambda *paths: field_mask_pb2.FieldMask(paths=paths)  # noqa: E731
    checked = create("s0", validate_only=True)
    equal(checked.description, "number s0", "a check shows what would be")
    equal(code(stub.GetPolicy, api.GetPolicyRequest(name=f"{TENANT}/policies/s0")), grpc.StatusCode.NOT_FOUND, "a check")
    made = [create(f"s{n}", request_id=f"id-{n}") for n in range(7)]
    equal(create("s3", request_id="id-3"), made[3], "the same request again")
    status, found = details(stub.CreatePolicy, api.CreatePolicyRequest(
        parent=TENANT, policy_id="other", policy=api.Policy(), request_id="id-3"))
    equal(status, grpc.StatusCode.INVALID_ARGUMENT, "the id of another request")
    equal(found["BadRequest"].field_violations[0].field, "request_id", "the field")

    def update(policy, **more):
        return stub.UpdatePolicy(api.UpdatePolicyRequest(policy=policy, **more), timeout=20)

    name = made[0].name
    now = update(api.Policy(name=name, retention_s=60, lease_ms=5000), update_mask=mask("retention_s"))
    equal((now.retention_s, now.lease_ms, now.description), (60, 0, "number s0"), "a masked update")
    now = update(api.Policy(name=name, lease_ms=5000))
    equal((now.retention_s, now.lease_ms), (60, 5000), "an update of what is set")
    now = update(api.Policy(name=name), update_mask=mask("lease_ms", "description"))
    equal((now.retention_s, now.lease_ms, now.description), (60, 0, ""), "what is named and not set")
    now = update(api.Policy(name=name, uid="other", version=99), update_mask=mask("uid", "version"))
    equal(now.uid, made[0].uid, "an output-only field")
    status, found = details(stub.UpdatePolicy, api.UpdatePolicyRequest(
        policy=api.Policy(name=name), update_mask=mask("nonsense")))
    equal(status, grpc.StatusCode.INVALID_ARGUMENT, "a mask of no field")
    equal(found["BadRequest"].field_violations[0].field, "update_mask", "the field")
    equal(found["ErrorInfo"].reason, "INVALID_FIELD", "the reason")
    expect("retention_s" in found["BadRequest"].field_violations[0].description, "what is allowed is said")
    status, found = details(stub.UpdatePolicy, api.UpdatePolicyRequest(policy=api.Policy(name=name, rpo_target_us=1)))
    equal(found["BadRequest"].field_violations[0].field, "policy.rpo_target_us", "the field")
    stale = api.UpdatePolicyRequest(policy=api.Policy(name=name, etag=made[0].etag, retention_s=70))
    status, found = details(stub.UpdatePolicy, stale)
    equal((status, found["ErrorInfo"].reason), (grpc.StatusCode.ABORTED, "ETAG_MISMATCH"), "an old etag")
    update(api.Policy(name=name, etag=now.etag, retention_s=70))

    listed, token, pages = [], "", 0
    while True:
        page = stub.ListPolicies(api.ListPoliciesRequest(
            parent=TENANT, page_size=3, page_token=token, filter='name = "*/s*"'), timeout=20)
        expect(len(page.policies) <= 3, "a page is longer than was asked for")
        listed += [policy.name for policy in page.policies]
        token, pages = page.next_page_token, pages + 1
        if not token:
            break
        if pages == 1:  # Behind the reader and before it: the rest neither comes twice nor is left out.
            stub.DeletePolicy(api.DeletePolicyRequest(name=listed[0]), timeout=20)
            other = token
    equal((listed, pages), ([policy.name for policy in made], 3), "the pages")
    for bad in [{"page_size": -1}, {"page_token": "x"}, {"page_token": other}, {"filter": "nonsense = 1"},
                {"filter": "(("}]:
        request = api.ListPoliciesRequest(parent=TENANT, **bad)
        equal(code(stub.ListPolicies, request), grpc.StatusCode.INVALID_ARGUMENT, f"{bad}")
    by = lambda text: [p.name.rsplit("/", 1)[1] for p in stub.ListPolicies(  # noqa: E731
        api.ListPoliciesRequest(parent=TENANT, filter=text), timeout=20).policies]
    equal(by('description:"number s5" OR description:"number s6"'), ["s5", "s6"], "a filter")
    equal(by('name = "*/s*" AND NOT version = 1'), [], "a filter")


def watches(at):
    """A watch that was cut off goes on where it was."""
    stub = services.StatusStub(at.channel)
    watch = lambda token="": stub.Watch(  # noqa: E731
        api.WatchRequest(parent=TENANT, events_only=True, resume_token=token), timeout=20)
    tokens = services.EnrolmentStub(at.channel)

    def join(name):
        made = tokens.CreateJoinToken(api.CreateJoinTokenRequest(parent=TENANT, role=api.ROLE_VIEWER, name=name), timeout=20)
        subprocess.run([AFTERIMAGE, "join", made.token, "--identity", FOLDER / f"{name}.json"], check=True,
                       stdout=subprocess.DEVNULL)

    stream = watch()
    stream.initial_metadata()  # It has begun.
    join("first")
    message = next(stream)
    expect("first" in message.event.message and message.resume_token, f"{message}")
    stream.cancel()
    join("second")
    join("third")
    stream = watch(message.resume_token)
    for who in ["second", "third"]:
        message = next(stream)
        expect(who in message.event.message and not message.gap, f"{message}")
    stream.cancel()
    bad = api.WatchRequest(parent=TENANT, resume_token="nonsense")
    equal(code(stub.Watch, bad), grpc.StatusCode.INVALID_ARGUMENT, "a token that is none")
    page = stub.ListEvents(api.ListEventsRequest(parent=TENANT, page_size=1, filter="message:third"), timeout=20)
    equal(len(page.events), 1, "one event")


def rpo(at):
    """Nothing is known of a group that is not there, and a period has to make sense."""
    stub = services.StatusStub(at.channel)
    request = api.GetRpoRequest(group=f"{TENANT}/groups/none")
    equal(code(stub.GetRpo, request), grpc.StatusCode.NOT_FOUND, "a group that is not there")
    for bad in [{"start_time_ns": 2, "end_time_ns": 1}, {"step_s": 61}, {"step_s": 60}]:
        status, found = details(stub.GetRpo, api.GetRpoRequest(group=f"{TENANT}/groups/none", **bad))
        equal(status, grpc.StatusCode.INVALID_ARGUMENT, f"{bad}")
        expect(found["BadRequest"].field_violations[0].field in bad, f"{bad}: {found}")


def operations(at):
    stub = services.OperationsStub(at.channel)
    name = f"{TENANT}/operations/none"
    for call, request in [(stub.GetOperation, api.GetOperationRequest), (stub.CancelOperation, api.CancelOperationRequest),
                          (stub.WaitOperation, api.WaitOperationRequest), (stub.DeleteOperation, api.DeleteOperationRequest)]:
        equal(code(call, request(name=name)), grpc.StatusCode.NOT_FOUND, "an operation that is not there")
        equal(code(call, request(name="x")), grpc.StatusCode.INVALID_ARGUMENT, "no name of an operation")
    listed = stub.ListOperations(api.ListOperationsRequest(parent=TENANT, filter="done = false"), timeout=20)
    equal(list(listed.operations), [], "operations that are not done")


def who_may(at):
    with at.connect(certificate=False) as channel:
        stub = services.PoliciesStub(channel)
        request = api.ListPoliciesRequest(parent=TENANT)
        equal(code(stub.ListPolicies, request), grpc.StatusCode.UNAUTHENTICATED, "without a certificate")
    unknown = at.channel.unary_unary("/afterimage.v1.Policies/Nuke", lambda m: b"", lambda b: b)
    equal(code(unknown, None), grpc.StatusCode.UNIMPLEMENTED, "a method that is not there")


ROLES = ["viewer", "operator", "admin", "proxy"]
#: Who may call what, written down once more: those who may, and the methods. Everything else is denied to everybody.
MAY = [
    (["viewer", "operator", "admin"], """
        Policies.GetPolicy Policies.ListPolicies Groups.GetGroup Groups.ListGroups Groups.GetDisk Groups.ListDisks
        Proxies.GetProxy Proxies.ListProxies Points.ListPoints Points.ResolvePoint Operations.GetOperation
        Operations.ListOperations Operations.WaitOperation Views.GetView Views.ListViews Status.GetStatus Status.GetRpo
        Status.Watch Status.ListEvents Backups.GetRestore Certificates.ListCertificates Certificates.GetAuthorities
        Groups.ExplainPlacement Machines.GetMachine Machines.ListMachines Machines.ProbeMachine Keys.GetKeys
        Plans.GetPlan Plans.ListPlans Plans.ListPlanRuns Plans.EstimatePlan"""),
    (["operator", "admin"], """
        Policies.CreatePolicy Policies.UpdatePolicy Policies.DeletePolicy Groups.CreateGroup Groups.UpdateGroup
        Groups.DeleteGroup Groups.CreateDisk Groups.DeleteDisk Groups.InspectBranch Points.CreateCut
        Groups.PauseGroup Groups.ResumeGroup
        Failovers.StartFailover Failovers.StartPlannedFailover Failovers.UndoFailover Failovers.ChangePoint
        Failovers.StartFailback Failovers.CancelFailback Failovers.SwitchFailback Failovers.CommitFailback
        Failovers.UndoFailback
        Failovers.TestFailover
        Operations.CancelOperation Operations.DeleteOperation Views.CreateView Views.DeleteView
        Machines.CreateMachine Machines.UpdateMachine Machines.DeleteMachine
        Plans.CreatePlan Plans.UpdatePlan Plans.DeletePlan
        Plans.RunPlan Plans.TestPlan Plans.UndoPlan Plans.StopPlan Plans.ResumePlan"""),
    (["admin"], """
        Proxies.DeleteProxy Audit.ListAuditRecords Audit.VerifyAudit Enrolment.CreateJoinToken Backups.CreateBackup
        Backups.ConfirmRestore Certificates.RevokeCertificates Certificates.RotateAuthority
        Keys.RotateKey Keys.RewrapKeys Keys.MakeRecoveryKey"""),
    (["proxy"], "ProxyControl.Session"),
    (ROLES, "Enrolment.Renew"),
    ([None, *ROLES], "Enrolment.Join"),
]


def joined(at, role, name):
    """The identity of somebody who has joined."""
    made = services.EnrolmentStub(at.channel).CreateJoinToken(api.CreateJoinTokenRequest(
        parent=TENANT, role=getattr(api, f"ROLE_{role.upper()}"), name=name), timeout=20)
    if role != "proxy":
        path = FOLDER / f"{name}.json"
        subprocess.run([AFTERIMAGE, "join", made.token, "--identity", path], check=True, stdout=subprocess.DEVNULL)
        return json.loads(path.read_text())
    token = json.loads(base64.urlsafe_b64decode(made.token.removeprefix("aij1_") + "=="))
    key, csr = signing_request(name)
    with at.connect(certificate=False) as channel:
        answer = services.EnrolmentStub(channel).Join(api.JoinRequest(
            token_id=token["i"], secret=token["s"], csr_pem=csr), timeout=20)
    return {"ca_pem": answer.ca_pem, "certificate_pem": answer.certificate_pem, "key_pem": key}


def signing_request(name):
    """A key and a request for a certificate, by another program than ours."""
    key, csr = FOLDER / f"{name}.key", FOLDER / f"{name}.csr"
    subprocess.run(["openssl", "req", "-new", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj",
                    "/CN=anything", "-keyout", key, "-out", csr], check=True, capture_output=True)
    return key.read_text(), csr.read_text()


def every_method(at):
    """Each method that reflection tells of, by each role and by nobody: denied unless it is in the list."""
    allowed = {f"/afterimage.v1.{name.replace('.', '/')}": who for who, names in MAY for name in names.split()}
    methods = [f"/afterimage.v1.{service.name}/{method.name}"
               for service in api.DESCRIPTOR.services_by_name.values() for method in service.methods]
    from afterimage.v1 import machine_pb2, plan_pb2, proxy_pb2
    methods += [f"/afterimage.v1.{service.name}/{method.name}" for file in (machine_pb2, plan_pb2, proxy_pb2)
                for service in file.DESCRIPTOR.services_by_name.values() for method in service.methods]
    equal(sorted(allowed), sorted(methods), "the list, and the methods that there are")
    people = {role: joined(at, role, f"any-{role}") for role in ROLES if role != "admin"}
    people |= {"admin": at.bundle, None: None}
    denied = {grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED}
    for role, bundle in people.items():
        with at.connect(certificate=bundle or False) as channel:
            for method in methods:
                # Nobody is asked for what would change something: an empty request makes sense to few methods.
                if role in allowed[method] and method.endswith(("Backup", "Audit", "RotateAuthority", "ConfirmRestore", "RewrapKeys",
                                                                    "MakeRecoveryKey")):
                    continue
                call = channel.stream_stream(method, lambda m: m, lambda b: b)
                try:
                    next(call(iter([b""]), timeout=2), None)
                    found = None
                except grpc.RpcError as error:
                    found = error.code()
                wrong = grpc.StatusCode.PERMISSION_DENIED if role else grpc.StatusCode.UNAUTHENTICATED
                if role in allowed[method]:
                    # Join refuses a token that is none by the same code.
                    expect(found not in denied or method.endswith("/Join"), f"{method} by {role}: {found}")
                else:
                    equal(found, wrong, f"{method} by {role}")


def replayed(at):
    """A token that was spent, and requests that were sent before, give nobody anything."""
    stub = services.EnrolmentStub(at.channel)
    made = stub.CreateJoinToken(api.CreateJoinTokenRequest(parent=TENANT, role=api.ROLE_ADMIN, name="eve"), timeout=20)
    token = json.loads(base64.urlsafe_b64decode(made.token.removeprefix("aij1_") + "=="))
    (_, csr), (_, other) = signing_request("eve"), signing_request("mallory")
    with at.connect(certificate=False) as channel:
        join = lambda **more: services.EnrolmentStub(channel).Join(api.JoinRequest(**{  # noqa: E731
            "token_id": token["i"], "secret": token["s"], "csr_pem": csr, "request_id": "once", **more}), timeout=20)
        first = join()
        # Its answer may have been lost: the same request gives the same holder a certificate for the same key.
        equal(join().name, first.name, "the same request again")
        for replay in ({"csr_pem": other}, {"request_id": "twice"}, {"request_id": ""}, {"secret": "guess"}):
            equal(code(join_of(join, replay)), grpc.StatusCode.PERMISSION_DENIED, f"replayed with {list(replay)}")


def join_of(join, more):
    return lambda timeout: join(**more)


def foreign(at):
    """A certificate that names an admin, of another authority: nobody's."""
    other = FOLDER / "other"
    process = Process(FOLDER, "other", "coordinator", "--data-dir", other, "--listen", f"127.0.0.1:{free_port()}")
    try:
        bundle = eventually("the other coordinator makes its bundle", lambda: at.read(other / "admin.json"))
    finally:
        process.kill()
    with at.connect(certificate=bundle) as channel:
        refused = code(services.PoliciesStub(channel).ListPolicies, api.ListPoliciesRequest(parent=TENANT))
        equal(refused, grpc.StatusCode.UNAVAILABLE, "the handshake of a foreign admin")
    alive(at, "a foreign certificate")


def thousand(at):
    """A thousand connections from one address, some in the middle of a handshake: others are answered, also new ones."""
    context = ssl.create_default_context(cadata=at.bundle["ca_pem"])
    context.set_alpn_protocols(["h2"])
    held, closed = [], 0
    try:
        for n in range(1000):
            sock = socket.create_connection(("127.0.0.1", at.port), timeout=10, source_address=("127.0.0.9", 0))
            held.append(sock)
            if n % 10 == 0:
                sock.sendall(b"\x16\x03\x01\x02\x00\x01")
        begun = time.monotonic()
        alive(at, "a thousand connections")
        with at.connect() as channel:
            services.PoliciesStub(channel).ListPolicies(api.ListPoliciesRequest(parent=TENANT), timeout=20)
        took = time.monotonic() - begun
        for sock in held:
            sock.setblocking(False)
            try:
                closed += sock.recv(1) == b""
            except BlockingIOError:
                pass
            except OSError:
                closed += 1
        print(f"    answered in {took * 1000:.0f} ms; {closed} of 1000 connections were closed at once", flush=True)
        expect(took < 5, f"others were answered in {took:.1f} s")
        expect(closed >= 400, f"only {closed} were closed")
    finally:
        for sock in held:
            sock.close()


def health(at):
    stub = health_pb2_grpc.HealthStub(at.channel)
    serving = health_pb2.HealthCheckResponse.SERVING
    for service in ["", *(f"afterimage.v1.{name}" for name in SERVICES)]:
        answer = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=20)
        equal(answer.status, serving, f"health of {service!r}")
    request = health_pb2.HealthCheckRequest(service="afterimage.v1.Nonsense")
    equal(code(stub.Check, request), grpc.StatusCode.NOT_FOUND, "health of what is not there")
    first = next(stub.Watch(health_pb2.HealthCheckRequest(service=""), timeout=20))
    equal(first.status, serving, "watched health")
    unknown = next(stub.Watch(request, timeout=20))
    equal(unknown.status, health_pb2.HealthCheckResponse.SERVICE_UNKNOWN, "watched health of what is not there")


def reflection(at):
    from google.protobuf import descriptor_pb2
    from grpc_reflection.v1alpha import reflection_pb2
    # The text of v1 is that of v1alpha under another package name.
    ask = at.channel.stream_stream("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
                                   reflection_pb2.ServerReflectionRequest.SerializeToString,
                                   reflection_pb2.ServerReflectionResponse.FromString)

    def one(**request):
        return next(ask(iter([reflection_pb2.ServerReflectionRequest(**request)]), timeout=20))

    listed = {service.name for service in one(list_services="").list_services_response.service}
    wanted = {f"afterimage.v1.{name}" for name in SERVICES} | {"grpc.health.v1.Health"}
    expect(wanted <= listed, f"not listed: {wanted - listed}")
    answer = one(file_containing_symbol="afterimage.v1.Policies")
    files = [descriptor_pb2.FileDescriptorProto.FromString(file)
             for file in answer.file_descriptor_response.file_descriptor_proto]
    ours = descriptor_pb2.FileDescriptorProto()
    api.DESCRIPTOR.CopyToProto(ours)
    found = next((file for file in files if file.name == ours.name), None)
    expect(found is not None, f"no {ours.name} among {[file.name for file in files]}")
    names = lambda file: ([s.name for s in file.service], [m.name for m in file.message_type])  # noqa: E731
    equal(names(found), names(ours), "services and messages")
    try:
        found = one(file_containing_symbol="afterimage.v1.Nonsense").error_response.error_code
    except grpc.RpcError as error:  # Our library ends the stream with the same code instead.
        found = error.code().value[0]
    equal(found, grpc.StatusCode.NOT_FOUND.value[0], "a symbol that is not there")


def deadlines(at):
    stub = services.StatusStub(at.channel)
    begun = time.monotonic()
    stream = stub.Watch(api.WatchRequest(parent=TENANT, events_only=True), timeout=1)
    try:
        for _ in stream:
            pass
        raise AssertionError("the stream has ended by itself")
    except grpc.RpcError as error:
        equal(error.code(), grpc.StatusCode.DEADLINE_EXCEEDED, "a watch beyond its deadline")
    expect(time.monotonic() - begun < 10, "it took long")


def too_much(at):
    with at.connect(options=(("grpc.max_send_message_length", -1),)) as channel:
        stub = services.PoliciesStub(channel)
        big = api.CreatePolicyRequest(parent=TENANT, policy_id="big", policy=api.Policy(description="x" * (8 << 20)))
        refused = code(stub.CreatePolicy, big)
        expect(refused in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.OUT_OF_RANGE), f"8 MiB: {refused}")
        metadata = (("x-much", "x" * 60_000),)
        request = api.ListPoliciesRequest(parent=TENANT)
        refused = code(stub.ListPolicies, request, metadata=metadata)
        expect(refused is not grpc.StatusCode.OK, f"headers of 60 KB: {refused}")


def raw(at, data, seconds=0.0):
    """Sends bytes and, after some time, goes away."""
    with socket.create_connection(("127.0.0.1", at.port), timeout=10) as sock:
        sock.sendall(data)
        time.sleep(seconds)


def hostile_bytes(at):
    raw(at, b"GET / HTTP/1.0\r\n\r\n")
    raw(at, b"\x16\x03\x01\xff\xff" + b"\0" * 70_000)
    raw(at, b"")
    context = ssl.create_default_context(cadata=at.bundle["ca_pem"])
    context.set_alpn_protocols(["h2"])
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    frame = lambda kind, flags, stream, body: (  # noqa: E731
        len(body).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + body)
    settings = frame(4, 0, 0, b"")
    attacks = {
        "nothing after the preface": preface,
        "no preface": b"\0" * 1000,
        "a frame of 16 MiB": preface + settings + b"\xff\xff\xff\0\0\0\0\0\1",
        "a thousand settings": preface + settings * 1000,
        "a thousand pings": preface + settings + frame(6, 0, 0, b"\0" * 8) * 1000,
        "headers without end": preface + settings + frame(1, 0, 1, b"\x40\x01a\x01b") + frame(9, 0, 1, b"\x40\x01a\x01b") * 5000,
        "streams opened and reset": preface + settings + b"".join(
            frame(1, 4, n, b"\x82\x86\x84") + frame(3, 0, n, b"\0\0\0\x08") for n in range(1, 4001, 2)),
        "window overflow": preface + settings + frame(8, 0, 0, b"\x7f\xff\xff\xff") * 3,
        "data on no stream": preface + settings + frame(0, 0, 77, b"x" * 100),
    }
    for what, data in attacks.items():
        with socket.create_connection(("127.0.0.1", at.port), timeout=10) as sock:
            with context.wrap_socket(sock, server_hostname="coordinator.afterimage") as tls:
                try:
                    tls.sendall(data)
                    tls.settimeout(2)
                    while tls.recv(65536):
                        pass
                except (OSError, ssl.SSLError):
                    pass
        alive(at, what)


def alive(at, after):
    stub = services.PoliciesStub(at.channel)
    try:
        stub.ListPolicies(api.ListPoliciesRequest(parent=TENANT), timeout=20)
    except grpc.RpcError as error:
        raise AssertionError(f"after {after}: {error.code()} {error.details()}") from error


def drip(at):
    """Requests whose bodies come drop by drop, on many streams, hold nobody else up."""
    stop = threading.Event()

    def slowly():
        while not stop.is_set():
            yield b""
            stop.wait(0.2)

    slow = at.channel.stream_unary("/afterimage.v1.Policies/ListPolicies", lambda m: m, lambda b: b)
    calls = [slow.future(slowly(), timeout=15) for _ in range(100)]
    begun = time.monotonic()
    alive(at, "slow bodies")
    took = time.monotonic() - begun
    stop.set()
    for call in calls:
        call.cancel()
    expect(took < 5, f"another call took {took:.1f} s")


def without_end(_):
    """Who calls without end is refused with the time to come back, and takes nothing from others."""
    at = Coordinator("limited", "--call-rate", "20", "--call-burst", "100")
    try:
        stub = services.PoliciesStub(at.channel)
        request = api.ListPoliciesRequest(parent=TENANT)
        begun, passed, refused = time.monotonic(), 0, None
        for call in [stub.ListPolicies.future(request, timeout=20) for _ in range(1000)]:
            if call.exception() is None:
                passed += 1
            else:
                refused = call
        took = time.monotonic() - begun
        expect(refused is not None, "nothing was refused")
        equal(refused.code(), grpc.StatusCode.RESOURCE_EXHAUSTED, "beyond the rate")
        # What was given when the channel was made counts, too.
        expect(90 <= passed <= 100 + 20 * (took + 5), f"{passed} got through in {took:.1f} s")
        found = {packed.TypeName().rsplit(".", 1)[1]: packed for packed in rpc_status.from_call(refused).details}
        retry = error_details_pb2.RetryInfo.FromString(found["RetryInfo"].value).retry_delay.ToTimedelta().total_seconds()
        expect(0 < retry <= 0.05 + 0.001, f"to be tried again after {retry} s")
        info = error_details_pb2.ErrorInfo.FromString(found["ErrorInfo"].value)
        equal(info.reason, "RATE_LIMITED", "the reason")
        # Another address' worth of callers: those without a certificate have a tenth, and are refused before the table.
        with at.connect(certificate=False) as channel:
            join = services.EnrolmentStub(channel)
            asked = api.JoinRequest(token_id="x", secret="y", csr_pem="z")
            codes = {code(join.Join, asked) for _ in range(100)}
            expect(grpc.StatusCode.RESOURCE_EXHAUSTED in codes and len(codes) > 1, f"{codes}")
        time.sleep(1)
        stub.ListPolicies(request, timeout=20)
        proxy = run_proxy(at)
        try:
            status = services.StatusStub(at.channel)
            hammer = threading.Event()

            def without_pause():
                while not hammer.is_set():
                    code_or_none(stub.ListPolicies, request)
            threads = [threading.Thread(target=without_pause) for _ in range(2)]
            [thread.start() for thread in threads]
            eventually("the proxy is connected while somebody calls without end", lambda: connected(status), timeout=30)
            hammer.set()
            [thread.join() for thread in threads]
        finally:
            proxy.stop()
    finally:
        at.channel.close()
        at.process.stop()


def code_or_none(call, request):
    try:
        call(request, timeout=20)
    except grpc.RpcError as error:
        return error.code()
    return None


def connected(status):
    """None while the caller itself has to wait."""
    try:
        return any(p.connected for p in status.GetStatus(api.GetStatusRequest(parent=TENANT), timeout=20).proxies)
    except grpc.RpcError:
        return None


def run_proxy(at):
    """A target by a token."""
    made = services.EnrolmentStub(at.channel).CreateJoinToken(
        api.CreateJoinTokenRequest(parent=TENANT, role=api.ROLE_PROXY, name="tgt"), timeout=20)
    return Process(FOLDER, "tgt", "proxy", "--name", "tgt", "--coordinator", f"127.0.0.1:{at.port}", "--state",
                   FOLDER / "tgt", "--journal", FOLDER / "journal", "--listen", f"127.0.0.1:{free_port()}",
                   env={"AFTERIMAGE_TOKEN": made.token})


def main():
    tests = Tests()
    at = Coordinator()
    try:
        tests.run("policies from a generated client, with the codes of the protocol", policies, at)
        tests.run("masks, etags, request ids, checks only, pages, filters, error details", standards, at)
        tests.run("a watch resumes where it was", watches, at)
        tests.run("the RPO of a period", rpo, at)
        tests.run("operations that are not there", operations, at)
        tests.run("a caller without a certificate, a method that is not there", who_may, at)
        tests.run("every method by every role", every_method, at)
        tests.run("replayed tokens and requests", replayed, at)
        tests.run("an admin of another authority", foreign, at)
        tests.run("a thousand connections", thousand, at)
        tests.run("health as its text says", health, at)
        tests.run("reflection tells the services and messages of the .proto files", reflection, at)
        tests.run("deadlines", deadlines, at)
        tests.run("messages and headers beyond the bounds", too_much, at)
        tests.run("hostile bytes at TLS and HTTP/2", hostile_bytes, at)
        tests.run("slow bodies", drip, at)
        tests.run("a caller without end, and a proxy beside it", without_end, at)
        expect(at.process.process.poll() is None, "the coordinator has ended")
    finally:
        at.channel.close()
        at.process.process.terminate()
        at.process.process.wait(timeout=20)
    tests.end()


if __name__ == "__main__":
    main()
