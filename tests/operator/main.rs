//! What operators get: rules and alerts, dashboards and the runbook. They are checked with promtool, and on a real
//! Prometheus that holds the metrics of real streams.

mod dashboards;
mod files;
mod live;
mod rules;
mod runbook;
mod service;
mod stack;
mod streams;
