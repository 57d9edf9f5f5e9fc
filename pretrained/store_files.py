"""How a memory store's dataset is changed: commits, and the merging and cleaning that keep it small.

A change writes its rows, and one commit then names them, lists which rows are gone, and fails if anybody else has
committed since. What is gone stays in its file until that is written again.
"""

from __future__ import annotations

import dataclasses
import time
from datetime import timedelta
from typing import Any

from recollect.memory_backends import lance_merging, lance_support
from recollect.memory_backends.errors import WriteConflict
from recollect.memory_backends.lance_places import Place
from recollect.pretrained import store_rows
from recollect.pretrained.store_identity import StoredDocument, StoreError
from recollect.pretrained.store_rows import About, Row

SECONDS_BETWEEN_CLEANINGS = 60.0
"""While documents are written: a version for each would make every commit dearer."""
LARGE_BYTES = 4 << 20
"""Of a file that is not merged: to write a long document again costs more than its file of its own."""
SECONDS_FOR_READERS = 3600.0
"""On an object store, where no lock says who reads: older versions than this go when a writer is done."""


class StoreFiles:
    """The dataset of a store in the version that it shows.

    Attributes:
        place: where it lies.
        dataset: Lance's.
        about: what its manifest says.
        rows: every document's row by its name, in the order they were added.
        texts: the row that holds the keys of a text, by the text's digest.
    """

    def __init__(self, place: Place, dataset: Any) -> None:
        self.place = place
        self._cleaned = time.monotonic()
        self.show(dataset)

    def show(self, dataset: Any) -> None:
        """Reads what a version holds, without its keys."""
        self.dataset = dataset
        self.about = About.read(dataset, self.place)
        rows = lance_support.ask(self.place, "read", lambda: store_rows.read_rows(self.about, dataset))
        self.rows = {row.document.name: row for row in rows}
        self.texts = {row.document.text_digest: row for row in rows if row.holds}

    def refresh(self) -> None:
        """Shows the newest version."""
        self.show(lance_support.newest(self.place, self.dataset))

    @property
    def listed(self) -> list[Row]:
        """Every document's row, in the order they were added."""
        return list(self.rows.values())

    def row_of(self, name: str, document: StoredDocument, *, holds: bool) -> Row:
        """A new row; its place in the order is that of the document that it replaces, else the last."""
        former = self.rows.get(name)
        # Rows are numbered as they come, so that a new document's row is also its place in the order.
        number = self.about.next_row if former is None else former.number
        return Row(self.about.next_row, number, document, holds)

    def settle_type(self, dtype: str, name: str) -> None:
        """Fixes the type of keys and values with the first document, and holds the others to it."""
        if self.about.dtype == dtype:
            return
        if self.rows:
            raise StoreError(
                f"{name}: its keys are {dtype}, and {self.place} holds {self.about.dtype}: run the model in that type, "
                "or make a new store"
            )
        self._commit(dataclasses.replace(self.about, dtype=dtype, gone=()), [])

    def change(self, names: list[str], batches: list[tuple[Any, Row]]) -> None:
        """Replaces documents by others in one commit; keys whose text another document has are handed on to it."""
        going = [self.rows[name] for name in names if name in self.rows]
        heirs = self._heirs(going, self.about.next_row + len(batches))
        new = [*batches, *((batch, row) for batch, row, _ in heirs)]
        leaving = {row.row for row in (*going, *(former for _, _, former in heirs))}
        about = dataclasses.replace(
            self.about,
            next_row=self.about.next_row + len(new),
            gone=(*self.about.gone, *sorted(leaving)),
        )
        fragments = []
        if new:
            size = sum(row.document.size for _, row in new)
            fragments = lance_support.write_rows(
                self.place, self.dataset, [batch for batch, _ in new], about.schema, size=size
            )
        try:
            self._commit(about, [*self._fragments(), *fragments])
        except StoreError:
            lance_support.drop_rows(self.place, fragments)
            raise
        self._list(going, [row for _, row in new])
        self._merge_small()

    def _list(self, going: list[Row], coming: list[Row]) -> None:
        """Brings the list of documents in line with a commit; one that is replaced keeps its place."""
        replaced = {row.document.name for row in coming}
        for row in going:
            if row.document.name not in replaced:
                del self.rows[row.document.name]
            if row.holds:
                del self.texts[row.document.text_digest]
        for row in coming:
            self.rows[row.document.name] = row
            if row.holds:
                self.texts[row.document.text_digest] = row

    def _heirs(self, going: list[Row], next_row: int) -> list[tuple[Any, Row, Row]]:
        """For each text whose keys would go while another document has it: that document's new row, and its former."""
        orphaned = {row.document.text_digest: row for row in going if row.holds}
        found: list[tuple[Any, Row, Row]] = []
        leaving = {row.row for row in going}
        for heir in self.listed if orphaned else []:
            row = orphaned.get(heir.document.text_digest) if heir.row not in leaving else None
            if row is not None:
                del orphaned[heir.document.text_digest]
                (batch,) = self.dataset.scanner(filter=f"row = {row.row}").to_batches()
                new = dataclasses.replace(heir, row=next_row + len(found), holds=True)
                found.append((store_rows.renamed(batch, new), new, heir))
        return found

    def _fragments(self) -> list[Any]:
        return [fragment.metadata for fragment in self.dataset.get_fragments()]

    def _commit(self, about: About, fragments: list[Any]) -> None:
        """The next version; refused where another writer has made one."""
        try:
            self.dataset = lance_support.commit_only(self.place, self.dataset, about.schema_with_metadata, fragments)
        except WriteConflict as error:
            raise StoreError(
                f"{self.place} is being written by another process: wait for it to end and run the same command again"
            ) from error
        self.about = about

    def _merge_small(self) -> None:
        run = lance_merging.run_to_merge(self._fragments(), large=LARGE_BYTES)
        if run:
            self._rewrite(self.dataset.get_fragments()[-run:])
            if time.monotonic() - self._cleaned > SECONDS_BETWEEN_CLEANINGS:
                self._clean(SECONDS_BETWEEN_CLEANINGS)

    def _rewrite(self, fragments: list[Any]) -> None:
        """Puts the documents of some fragments into fewer and larger ones; rows that are gone stay behind."""
        if not fragments:
            return
        about, dataset = self.about, self.dataset
        left = {row for fragment in fragments for row in store_rows.rows_in(fragment)} & set(about.gone)
        names = list(about.schema.names)
        merged = lance_merging.merge(
            self.place,
            dataset,
            fragments,
            lambda run: store_rows.scan(about, dataset, names, self.listed, run),
            about.schema,
        )
        gone = tuple(row for row in about.gone if row not in left)
        self._commit(dataclasses.replace(about, gone=gone), merged.in_place_of(self._fragments()))

    def tidy(self) -> None:
        """Gives back the room of what was removed, and of what killed writers and older versions left."""
        gone = set(self.about.gone)
        if gone:
            self._rewrite([each for each in self.dataset.get_fragments() if store_rows.rows_in(each) & gone])
        self._clean(0.0)

    def _clean(self, keep_seconds: float) -> None:
        """Removes what only older versions need; on an object store, where others may read, none of the last hour."""
        local = self.place.folder is not None
        seconds = max(keep_seconds, 1e-6) if local else SECONDS_FOR_READERS
        dataset = self.dataset
        lance_support.ask(
            self.place,
            "tidy",
            lambda: dataset.cleanup_old_versions(
                older_than=timedelta(seconds=seconds),
                delete_unverified=local,  # here the lock says that nobody else is writing
                error_if_tagged_old_versions=False,
            ),
        )
        self._cleaned = time.monotonic()
