"""Finds conversations by words in their titles and texts.

SQLite's FTS5 with its trigrams finds any three letters; where it is missing, and for shorter words, every text is looked
through.
"""

import sqlite3

_ADD = "INSERT INTO found (rowid, content, owner, conversation, message) VALUES (?, ?, ?, ?, ?)"


class ChatSearch:
    """The index, inside the file of the conversations. The caller holds its lock."""

    def __init__(self, file: sqlite3.Connection) -> None:
        self._file = file
        try:
            file.execute(
                "CREATE VIRTUAL TABLE IF NOT EXISTS found USING fts5("
                "content, owner UNINDEXED, conversation UNINDEXED, message UNINDEXED, tokenize = 'trigram')"
            )
            self.has_index = True
        except sqlite3.OperationalError:
            self.has_index = False

    def title(self, owner: str, conversation: str, title: str) -> None:
        row = self._file.execute("SELECT rowid FROM conversation WHERE id = ?", (conversation,)).fetchone()[0]
        self._replace(2 * row + 1, owner, conversation, 0, title)

    def text(self, owner: str, conversation: str, message: int, text: str) -> None:
        self._replace(2 * message, owner, conversation, message, text)

    def forget(self, conversation: str) -> None:
        """Before its rows are deleted."""
        if self.has_index:
            for table, row in (("message", "2 * id"), ("conversation", "2 * rowid + 1")):
                key = "conversation" if table == "message" else "id"
                query = f"DELETE FROM found WHERE rowid IN (SELECT {row} FROM {table} WHERE {key} = ?)"
                self._file.execute(query, (conversation,))

    def conversations(self, owner: str, query: str) -> set[str]:
        """Ids of the conversations of an owner with all words of the query in one text or title, in any case of letters."""
        words = query.split()[:20]
        if self.has_index and all(len(word) >= 3 for word in words):
            phrase = " AND ".join('"' + word.replace('"', '""') + '"' for word in words)
            rows = self._file.execute(
                "SELECT DISTINCT found.conversation FROM found LEFT JOIN message ON message.id = found.message "
                "WHERE found MATCH ? AND found.owner = ? AND (found.message = 0 OR NOT message.deleted)",
                (phrase, owner),
            )
            return {row[0] for row in rows}
        like = ["%" + word.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_") + "%" for word in words]
        in_text = " AND ".join("message.text LIKE ? ESCAPE '\\'" for _ in like)
        in_title = " AND ".join("conversation.title LIKE ? ESCAPE '\\'" for _ in like)
        rows = self._file.execute(
            "SELECT conversation.id FROM conversation LEFT JOIN message ON message.conversation = conversation.id "
            f"AND NOT message.deleted WHERE conversation.owner = ? AND (({in_text}) OR ({in_title}))",
            (owner, *like, *like),
        )
        return {row[0] for row in rows}

    def _replace(self, row: int, owner: str, conversation: str, message: int, text: str) -> None:
        """One row of the index; its number says what it is of, because only that is found quickly."""
        if self.has_index:
            self._file.execute("DELETE FROM found WHERE rowid = ?", (row,))
            self._file.execute(_ADD, (row, text, owner, conversation, message))
