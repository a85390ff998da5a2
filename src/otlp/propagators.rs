//! The propagators, which carry the context of a trace over the borders of a service.

use opentelemetry::global;
use opentelemetry::propagation::{TextMapCompositePropagator, TextMapPropagator};
use opentelemetry_sdk::propagation::{BaggagePropagator, TraceContextPropagator};

use super::env::Variables;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Propagator {
    TraceContext,
    Baggage,
}

const DEFAULT: [Propagator; 2] = [Propagator::TraceContext, Propagator::Baggage];

/// Reads `OTEL_PROPAGATORS`; ignores unknown names with a warning.
pub(super) fn read(env: &mut Variables<'_>) -> Vec<Propagator> {
    let variable = "OTEL_PROPAGATORS";
    let Some(value) = env.get(variable) else {
        return DEFAULT.to_vec();
    };
    let (mut propagators, mut is_none, mut unknown) = (Vec::new(), false, Vec::new());
    for name in value.split(',').map(str::trim) {
        let propagator = match name.to_ascii_lowercase().as_str() {
            "tracecontext" => Propagator::TraceContext,
            "baggage" => Propagator::Baggage,
            other => {
                is_none |= other == "none";
                unknown.extend((other != "none").then_some(name));
                continue;
            }
        };
        if !propagators.contains(&propagator) {
            propagators.push(propagator);
        }
    }
    if propagators.is_empty() && !is_none {
        propagators = DEFAULT.to_vec();
    }
    if !unknown.is_empty() {
        let used: Vec<_> = propagators.iter().map(|propagator| propagator.name()).collect();
        let used = if used.is_empty() { "none".to_owned() } else { used.join(",") };
        env.refuse((variable, &value), "tracecontext, baggage or none", used);
    }
    propagators
}

/// Sets the global propagator; leaves it as it is if there are none.
pub(super) fn set_global(propagators: &[Propagator]) {
    if !propagators.is_empty() {
        let propagators = propagators.iter().map(|propagator| propagator.create()).collect();
        global::set_text_map_propagator(TextMapCompositePropagator::new(propagators));
    }
}

impl Propagator {
    fn name(self) -> &'static str {
        match self {
            Self::TraceContext => "tracecontext",
            Self::Baggage => "baggage",
        }
    }

    fn create(self) -> Box<dyn TextMapPropagator + Send + Sync> {
        match self {
            Self::TraceContext => Box::new(TraceContextPropagator::new()),
            Self::Baggage => Box::new(BaggagePropagator::new()),
        }
    }
}
