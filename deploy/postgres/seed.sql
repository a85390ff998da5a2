-- Creates 200,000 orders to stream: SELECT data FROM orders.
-- Every run creates the same orders: values come from hash functions instead of random().

SET timezone = 'UTC'; -- for placed_at

CREATE TABLE orders (
    id bigint PRIMARY KEY,
    data jsonb NOT NULL
);

INSERT INTO orders (id, data)
SELECT n, jsonb_build_object(
    'id', n,
    'status', (ARRAY['open', 'paid', 'shipped', 'returned'])[1 + h % 4],
    'placed_at', timestamptz '2026-01-01 00:00:00+00' + n * interval '2 minutes',
    'customer', jsonb_build_object(
        'id', h % 20000,
        'name', 'Customer ' || h % 20000,
        'country', (ARRAY['CA', 'DE', 'FR', 'JP', 'US'])[1 + h % 5]
    ),
    'lines', (
        SELECT jsonb_agg(jsonb_build_object(
            'product', 'P-' || lpad((h * line % 5000)::text, 5, '0'),
            'quantity', 1 + h * line % 4,
            'unit_price', ((99 + h * line % 20000) / 100.0)::numeric(8, 2)
        ))
        FROM generate_series(1, 1 + h % 5) AS line
    )
)
FROM generate_series(1, 200000) AS n,
    LATERAL (SELECT abs(hashint8(n)::bigint) AS h) AS hash;

ANALYZE orders;
