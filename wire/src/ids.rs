//! Names that cross a process. All are 16 random bytes unless said otherwise, so none needs a registry.

use std::fmt;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

macro_rules! id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(
            Copy, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Default,
            FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
        )]
        #[repr(C)]
        pub struct $name(pub [u8; 16]);

        impl $name {
            /// The id that names nothing.
            pub const NONE: Self = Self([0; 16]);

            /// A fresh random id.
            pub fn random() -> Self {
                Self(*uuid::Uuid::new_v4().as_bytes())
            }

            /// True for [`Self::NONE`].
            pub fn is_none(&self) -> bool {
                *self == Self::NONE
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}", uuid::Uuid::from_bytes(self.0).as_hyphenated())
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({})", stringify!($name), self)
            }
        }

        impl std::str::FromStr for $name {
            type Err = BadId;
            fn from_str(s: &str) -> Result<Self, BadId> {
                uuid::Uuid::parse_str(s)
                    .map(|u| Self(*u.as_bytes()))
                    .map_err(|_| BadId(s.to_owned()))
            }
        }
    };
}

/// A string that is no id.
#[derive(Debug, thiserror::Error, Clone, PartialEq, Eq)]
#[error("`{0}` is not an id (expected a UUID such as 67e55044-10b1-426f-9247-bb680e5fe0c8)")]
pub struct BadId(pub String);

id!(
    /// One block device, for as long as it exists, whatever its path or proxy.
    DiskId
);
id!(
    /// All records of one group on one source proxy.
    StreamId
);
id!(
    /// One life of one writer, with its own data key. Never used twice.
    IncarnationId
);
id!(
    /// A branch of history.
    TimelineId
);
id!(
    /// The key under which data keys are wrapped.
    PolicyKeyId
);
