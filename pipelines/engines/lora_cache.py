"""Adapters inside a vLLM engine: added before use, held while requests use them, the least recently used leave first.

An adapter is fetched, checked and added to the engine before its first request is handed over: one that cannot be used
is the error of its row, where inside the engine it would be the end of the engine.
"""

import asyncio
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from pipelines.engines.adapters import AdapterName, AdapterShelf


@dataclass
class _Loaded:
    request: "asyncio.Task[Any]"
    """Task that gives the LoRARequest under which the engine knows it."""
    users: int = 0
    """Requests that hold it."""


class LoadedAdapters:
    """The adapters in an engine: added before use, held while requests use them, the least recently used leave first.

    Lives in the engine's loop; none of its methods is for another thread.
    """

    def __init__(self, engine: Any, shelf: AdapterShelf, room: int) -> None:
        self.engine, self.shelf, self.room = engine, shelf, room
        self._loaded: OrderedDict[AdapterName, _Loaded] = OrderedDict()
        self._changed = asyncio.Condition()
        self._numbers = 0

    async def none(self) -> Any:
        """The engine's request for an adapter that adds nothing, which stays.

        vLLM's CPU kernels index the slots of adapters with -1 for a row that has none: once all slots are taken, such a
        row gets the adapter of the last one, which is somebody else's (seen with vLLM 0.32). So no row is without.
        """
        from vllm.lora.request import LoRARequest

        self._numbers += 1
        request = LoRARequest("none", self._numbers, str(self.shelf.put_nothing()))
        await self.engine.add_lora(request)
        return request

    async def hold(self, name: AdapterName) -> Any:
        """The engine's request for this adapter, which stays until `let_go`.

        Raises:
            ValueError: it is not in the table, not what it has to be, cannot be fetched or laid out, or the engine
                does not take it.
        """
        while name not in self._loaded and len(self._loaded) >= self.room:
            idle = next((other for other, loaded in self._loaded.items() if not loaded.users), None)
            if idle is not None:
                await self._remove(idle)
                continue
            async with self._changed:
                await self._changed.wait()
        if name not in self._loaded:
            self._loaded[name] = _Loaded(asyncio.ensure_future(self._load(name)))
        loaded = self._loaded[name]
        loaded.users += 1
        self._loaded.move_to_end(name)
        try:
            return await asyncio.shield(loaded.request)
        except Exception:
            loaded.users -= 1
            if self._loaded.get(name) is loaded:  # the first to see it; the others hold the same object
                del self._loaded[name]
                await self._tell()
            raise

    async def let_go(self, name: AdapterName) -> None:
        self._loaded[name].users -= 1
        await self._tell()

    async def _load(self, name: AdapterName) -> Any:
        path = await self._laid_out(name)
        from vllm.lora.request import LoRARequest
        from vllm.v1.engine.exceptions import EngineDeadError

        self._numbers += 1
        request = LoRARequest(str(name), self._numbers, str(path))
        try:
            await self.engine.add_lora(request)
        except EngineDeadError:
            raise
        except Exception as error:  # the engine hands over whatever its loader raised
            await self.engine.remove_lora(request.lora_int_id)  # half taken, it would push out one that is in use
            what = f"adapter {name.adapter_id}: the engine does not take it ({type(error).__name__})"
            raise ValueError(what) from error
        finally:
            # vLLM 0.32 never reads it again while the adapter is in its cache, where `room` keeps it. Left lying, the
            # folders of up to 512 adapters would take as much memory again, and fill a small /dev/shm.
            self.shelf.drop(name)
        return request

    async def _laid_out(self, name: AdapterName) -> Any:
        """The adapter's folder. Raises ValueError, whatever the table's storage or the memory's disk raised."""
        try:
            return await asyncio.get_running_loop().run_in_executor(None, self.shelf.put, name)
        except ValueError:
            raise
        except Exception as error:
            self.shelf.drop(name)  # half a folder takes room, too
            said = getattr(error, "strerror", None)  # without the path, which is of this machine
            what = type(error).__name__ + (f": {said}" if said else "")
            problem = f"adapter {name.adapter_id}: it cannot be fetched or laid out in memory ({what})"
            raise ValueError(problem) from error

    async def _remove(self, name: AdapterName) -> None:
        request = self._loaded.pop(name).request.result()
        await self.engine.remove_lora(request.lora_int_id)
        await self._tell()

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()
