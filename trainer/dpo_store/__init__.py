"""Objects in S3, in local folders and on mounted volume claims, behind one small interface.

    store = open_store(StorageOptions(endpoint="https://s3.example.com"))
    for info in store.expand("s3://prefs/train/*.jsonl.gz"):
        for number, line in store.lines(info):
            ...

Addresses (URIs) everywhere: ``s3://bucket/key``, a plain path or ``file:///path``, ``pvc://claim/path`` (the folder
``$DPO_PVC_ROOT/claim/path``), and to read ``hf://org/name@revision/path``. A folder's address may end with ``/`` or not
where a method says "folder".

Credentials come from boto3's usual chain (environment, profile, web identity, instance role), or from a folder of files
that the options name.
Every failure is a ``dpo_api.errors.DPOError`` whose message is one sentence; :mod:`dpo_store.errors` is the one table
from foreign error codes to those classes, and says which are tried again. No torch, no asyncio; safe for threads.

Memory of ``stream`` is at most ``ahead`` bytes (16 MiB) plus 3 MiB, whatever the object's size; :mod:`dpo_store.lines`
gives the bound of ``lines``.
"""

from dpo_store.errors import ObjectChangedError
from dpo_store.hub import HubMissingError
from dpo_store.options import ObjectInfo, RetryPolicy, StorageOptions, Timing
from dpo_store.store import Store, open_store
from dpo_store.uris import base_name, is_remote, join_uri, local_path_of

__all__ = [
    "HubMissingError",
    "ObjectChangedError",
    "ObjectInfo",
    "RetryPolicy",
    "StorageOptions",
    "Store",
    "Timing",
    "base_name",
    "is_remote",
    "join_uri",
    "local_path_of",
    "open_store",
]
