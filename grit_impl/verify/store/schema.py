"""The tables of `results.db`: one migration per schema version, each applied once and never changed afterwards.

Numbers that are not finite round-trip: SQLite keeps infinities, and NaN (which it would turn into NULL) is kept as
the text 'NaN'. NULL means "not measured".

Questions people ask:

    -- the last session's verdicts
    SELECT * FROM latest_claims;
    -- how a metric moved from session to session
    SELECT started, git_commit, estimate, low, high FROM metric_history
    WHERE claim_id = 'evaluation.pure-delta-aqi' AND name = 'delta_aqi' ORDER BY started;
    -- the plan's table
    SELECT model_name, aqi_accuracy, delta_aqi, inference_speed, delta_speed, timestamp FROM evaluation_results;
    -- items that plain LoRA answered and pure GRIT did not
    SELECT a.item_id, a.prompt, b.answer FROM latest_items a JOIN latest_items b USING (suite, item_id)
    WHERE a.model = 'baseline' AND b.model = 'pure' AND a.correct AND NOT b.correct;
"""

from __future__ import annotations

MIGRATIONS = (
    """
    CREATE TABLE sessions (
        id INTEGER PRIMARY KEY,
        started TEXT NOT NULL,              -- ISO 8601, UTC
        finished TEXT NOT NULL,
        git_commit TEXT,                    -- of the project that was verified
        options TEXT NOT NULL,              -- JSON
        exit_status INTEGER NOT NULL,
        label TEXT UNIQUE                   -- 'baseline' once promoted
    );
    CREATE TABLE environment (
        session_id INTEGER NOT NULL REFERENCES sessions(id) ON DELETE CASCADE,
        name TEXT NOT NULL,                 -- python, platform, torch, ...
        value TEXT,
        PRIMARY KEY (session_id, name)
    );
    CREATE TABLE runs (
        id TEXT PRIMARY KEY,                -- arm, start and fingerprint: a reused run is stored once
        arm TEXT NOT NULL,
        base_model TEXT,
        seed INTEGER,
        steps INTEGER,
        started TEXT,
        finished TEXT,
        train_seconds REAL,
        peak_memory_bytes INTEGER,
        final_loss REAL,
        fingerprint TEXT,
        path TEXT,
        record TEXT NOT NULL                -- run.json
    );
    CREATE TABLE session_runs (
        session_id INTEGER NOT NULL REFERENCES sessions(id) ON DELETE CASCADE,
        run_id TEXT NOT NULL REFERENCES runs(id),
        PRIMARY KEY (session_id, run_id)
    );
    CREATE TABLE claims (
        id TEXT PRIMARY KEY,
        statement TEXT NOT NULL,
        rationale TEXT NOT NULL,
        requires TEXT NOT NULL,             -- JSON list
        gates INTEGER NOT NULL              -- 1: must hold; 0: hypothesis
    );
    CREATE TABLE verdicts (
        id INTEGER PRIMARY KEY,
        session_id INTEGER NOT NULL REFERENCES sessions(id) ON DELETE CASCADE,
        claim_id TEXT NOT NULL REFERENCES claims(id),
        verdict TEXT NOT NULL CHECK (verdict IN ('supported', 'refuted', 'inconclusive', 'not exercised')),
        summary TEXT NOT NULL,
        needed_n INTEGER,                   -- sample size that would decide an inconclusive one
        evidence TEXT NOT NULL,             -- JSON
        node_id TEXT                        -- the test; may repeat (subtests)
    );
    CREATE TABLE metrics (
        id INTEGER PRIMARY KEY,
        verdict_id INTEGER NOT NULL REFERENCES verdicts(id) ON DELETE CASCADE,
        subject TEXT NOT NULL,              -- arm, model or comparison
        name TEXT NOT NULL,
        estimate REAL,
        low REAL,
        high REAL,
        method TEXT NOT NULL,
        n INTEGER,
        unit TEXT NOT NULL
    );
    CREATE TABLE series (
        run_id TEXT NOT NULL REFERENCES runs(id),
        name TEXT NOT NULL,                 -- loss, grad_norm, learning_rate, seconds, ...
        step INTEGER NOT NULL,
        value REAL,
        PRIMARY KEY (run_id, name, step)
    ) WITHOUT ROWID;
    CREATE TABLE items (
        session_id INTEGER NOT NULL REFERENCES sessions(id) ON DELETE CASCADE,
        model TEXT NOT NULL,
        suite TEXT NOT NULL,                -- aqi or knowledge
        item_id TEXT NOT NULL,
        prompt TEXT,
        answer TEXT,
        parsed TEXT,                        -- JSON
        correct INTEGER,
        tokens INTEGER,
        seconds REAL,
        PRIMARY KEY (session_id, model, suite, item_id)
    ) WITHOUT ROWID;
    CREATE TABLE artifacts (
        session_id INTEGER NOT NULL REFERENCES sessions(id) ON DELETE CASCADE,
        subject TEXT NOT NULL,              -- arm or model
        kind TEXT NOT NULL,                 -- adapter, gguf, ledger, ...
        path TEXT NOT NULL,
        sha256 TEXT NOT NULL,
        bytes INTEGER NOT NULL,
        PRIMARY KEY (session_id, path)
    );
    CREATE TABLE evaluation_results (
        model_name TEXT NOT NULL,
        aqi_accuracy REAL,                  -- percent of categories right
        delta_aqi REAL,                     -- points over the base
        inference_speed REAL,               -- tokens/s
        delta_speed REAL,                   -- percent against the base
        timestamp TEXT NOT NULL,
        session_id INTEGER REFERENCES sessions(id) ON DELETE CASCADE
    );
    CREATE INDEX verdicts_by_session ON verdicts(session_id, claim_id);
    CREATE INDEX metrics_by_verdict ON metrics(verdict_id);

    CREATE VIEW latest_claims AS
        SELECT v.claim_id, v.verdict, v.summary, CASE c.gates WHEN 1 THEN 'gate' ELSE 'hypothesis' END AS kind,
               v.needed_n, c.statement, c.rationale
        FROM verdicts v JOIN claims c ON c.id = v.claim_id
        WHERE v.session_id = (SELECT max(id) FROM sessions) ORDER BY v.id;
    CREATE VIEW latest_items AS
        SELECT * FROM items WHERE session_id = (SELECT max(session_id) FROM items);
    CREATE VIEW metric_history AS
        SELECT s.id AS session_id, s.started, s.git_commit, s.label, v.claim_id, v.verdict, m.subject, m.name,
               m.estimate, m.low, m.high, m.unit, m.n, m.method
        FROM metrics m JOIN verdicts v ON v.id = m.verdict_id JOIN sessions s ON s.id = v.session_id;
    CREATE VIEW run_overview AS
        SELECT sr.session_id, r.arm, r.base_model, r.seed, r.steps, r.train_seconds,
               r.peak_memory_bytes / 1073741824.0 AS peak_memory_gib, r.final_loss, r.started
        FROM session_runs sr JOIN runs r ON r.id = sr.run_id ORDER BY sr.session_id DESC, r.arm;
    """,
)
"""Entry i takes the file from schema version i to i + 1 (`PRAGMA user_version`)."""
